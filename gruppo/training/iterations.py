"""The outer iterations of Algorithm 1: the reference becomes the policy, and the reward model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gruppo.data.mixture import Mixture
from gruppo.errors import RunError
from gruppo.models.packing import Batch
from gruppo.models.weights import save_weights
from gruppo.rollout.labels import label_rows, read_labels
from gruppo.rollout.source import RolloutSource
from gruppo.runs.tables import LABELS
from gruppo.training.checkpointer import Checkpointer
from gruppo.training.context import RunContext
from gruppo.training.nonfinite import FiniteGuard
from gruppo.training.policy_trainer import PolicyTrainer
from gruppo.training.reward_model import RewardModelTrainer
from gruppo.utils.files import file_sha256, link_file
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.timing import PhaseTimer


class Iterations:
    """Begins an outer iteration when one is due.

    First π_ref ← π_θ. Then the reward model, if it is trained, learns from new samples of the policy and from a share
    of the samples that earlier iterations labeled.
    """

    def __init__(
        self,
        context: RunContext,
        policy: PolicyTrainer,
        reward_model: RewardModelTrainer | None,
        source: RolloutSource,
        prompts: Mixture,
        checkpointer: Checkpointer,
        guard: FiniteGuard,
        sizes: BatchSizes,
    ) -> None:
        self.context, self.policy, self.reward_model = context, policy, reward_model
        self.source, self.prompts, self.checkpointer = source, prompts, checkpointer
        self.guard, self.sizes = guard, sizes
        self.learning = False  # the reward model is only partly trained, so the run must not be saved

    def due(self) -> bool:
        """Whether an iteration begins before the next step."""
        run, state = self.context.recipe.run, self.context.state
        return not self.context.at_end and state.iteration <= state.step // (run.steps // run.iterations)

    def begin(self) -> None:
        """Begin an iteration, with a checkpoint before and after it unless there is nothing to lose."""
        state, timer, number = self.context.state, PhaseTimer(), self.context.state.iteration + 1
        if number == 1 and self.reward_model is None:
            state.iteration = number
            return
        if state.step:
            self.checkpointer.save()
            if self.context.callbacks.stopped:
                self.checkpointer.forget()
                return
        if number > 1 and self.policy.reference is not None:
            self._replace_reference()
        figures: dict[str, float | None] = {}
        if self.reward_model is not None:
            self.learning = True
            with timer("reward_model"), self.context.stop.interruptible():  # an interrupted round starts again
                figures = self._train_reward_model(self.reward_model, number)
            self.learning = False
        state.iteration = number
        state.train_seconds += timer.total
        times = {f"time/{name}": seconds for name, seconds in timer.seconds.items()}
        size = {"memory/micro_batch_tokens": self.sizes.micro_batch_tokens}
        self.context.recorder.step({"step": state.step, "iteration": number, **figures, **times, **size})
        self.checkpointer.save()
        if self.context.callbacks.stopped:
            self.checkpointer.forget()

    def _replace_reference(self) -> None:
        """π_ref ← π_θ. The new reference's weights are saved next to the checkpoints."""
        file = self.checkpointer.reference_file
        with self.context.folder.building(file.parent.name) as folder:
            save_weights(dict(self.policy.weights), folder, file.name)
        self.policy.replace_reference()

    def restore_reference(self, checkpoint: Path) -> None:
        """Load the reference of a later iteration from the checkpoint that the run continues from.

        The weights pass through the policy, so the policy's weights must be loaded after this.
        """
        target = self.checkpointer.reference_file
        file = checkpoint / target.name
        if not file.is_file():
            return
        target.parent.mkdir(exist_ok=True)
        link_file(file, target)
        self.policy.load_reference(file)

    def _train_reward_model(self, trainer: RewardModelTrainer, number: int) -> dict[str, float | None]:
        """Sample and label by rule, then train on the new labels and on a share of the earlier ones."""
        context, state, settings = self.context, self.context.state, trainer.settings
        prompts = self.prompts.draw(state.cursor, settings.prompts)
        labels, failures = self.source.label(prompts, state.step, (context.recipe.run.seed, 0, state.cursor))
        for failure, count in failures.items():
            context.recorder.event("reward_failed", failure, state.step, completions=count)
        if failures:
            total = sum(failures.values())
            context.recorder.note(f"Step {state.step}: {total} verdicts for labels failed; see events.jsonl")
        earlier = [context.folder.path / "labels" / name for name in sorted(state.labels)]
        for file in earlier:
            if not file.is_file() or file_sha256(file) != state.labels[file.name]:
                raise RunError(f"{file}: is not what this run wrote, but its reward model learns from it; restore it")
        history = [label.sample(settings) for label in read_labels(earlier)]
        table = context.folder.table("labels", state.step, label_rows(labels), LABELS)
        state.cursor += len(prompts)
        state.labels[table.name] = file_sha256(table)

        def require(value: float, what: str, batches: Sequence[Batch]) -> None:
            self.guard.require(value, f"reward model's {what}", batches, 0, "reward_model.learning_rate")

        def warn(message: str) -> None:
            context.recorder.event("reward_model_labels", message, state.step)
            context.recorder.note(f"Step {state.step}: warning: {message}")

        new = [label.sample(settings) for label in labels]
        return trainer.learn(new, history, number, require, context.recorder, context.stop, warn)
