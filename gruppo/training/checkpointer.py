"""When a run is saved, and how it is restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from gruppo.errors import RunError
from gruppo.rollout.sampled_step import SampledStep, write_sampled
from gruppo.runs.missing import saved_step
from gruppo.runs.status import StatusFile
from gruppo.training.changes import DIFFER, comparable_from
from gruppo.training.changes import KIND as CHANGED
from gruppo.training.checkpoint import drop_old, load_state, newest_checkpoint, save_checkpoint
from gruppo.training.context import RunContext
from gruppo.training.model_files import ModelFiles
from gruppo.training.setup import RunComponents
from gruppo.utils.system import peak_memory

REFERENCE = "reference.safetensors"  # the weights of a reference that is not the initial model


@dataclass(frozen=True)
class Restored:
    """What a run continues from.

    `checkpoint`: its folder, None for the beginning. `problems`: descriptions of newer checkpoints that are unusable.
    """

    checkpoint: Path | None
    problems: list[str]


class Checkpointer:
    """Saves checkpoints, and the final model at the last step.

    `models`: the files of the run's models. `status`: records the last checkpoint. `enabled`: False if nothing is to be
    saved. `sampled_ahead`: waits for the steps that a checkpoint has to keep, and returns them.
    """

    def __init__(
        self, context: RunContext, parts: RunComponents, models: ModelFiles, status: StatusFile, enabled: bool = True
    ) -> None:
        self.context, self.parts, self.models, self.status, self.enabled = context, parts, models, status, enabled
        self.sampled_ahead: Callable[[], Sequence[SampledStep]] = lambda: ()
        self._saved: tuple[int, bool, int] | None = None

    @property
    def reference_file(self) -> Path:
        """File for the weights of a later iteration's reference."""
        return self.context.folder.path / "reference" / REFERENCE

    @property
    def _position(self) -> tuple[int, bool, int]:
        state = self.context.state
        return state.step, state.evaluated, state.iteration

    def save(self) -> None:
        """Save a checkpoint (and the final model at the last step) unless the current state is already saved."""
        if self._saved == self._position or not self.enabled:
            return
        context = self.context
        if context.at_end:
            self._save_final_model()
        self.note_memory()
        steps = self.sampled_ahead()
        with context.recorder.bar("Saving", None, ""):
            later = self.reference_file.is_file() and context.state.iteration > 1
            files = [self.reference_file] if later else []
            path = save_checkpoint(
                context.folder, lambda building: self._save_files(building, steps), context.state, files
            )
        self._saved = self._position
        self.status.update(now=True, checkpoint=context.state.step)
        context.callbacks.notify("on_checkpoint", context.state.step, path)

    def _save_files(self, folder: Path, steps: Sequence[SampledStep]) -> None:
        self.models.save(folder)
        write_sampled(folder, steps)

    def forget(self) -> None:
        """Make the next `save` save this step again: it has become the last one and needs a final model."""
        self._saved = None

    def note_memory(self) -> None:
        """Record peak memory in the state."""
        state = self.context.state
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory(self.parts.policy.device))

    def restore(self) -> Restored:
        """Find the newest intact checkpoint and load its state; `load_tensors` loads its tensors."""
        folder, problems = newest_checkpoint(self.context.folder)
        if folder is not None:
            loaded = load_state(folder)
            for field in fields(loaded):
                setattr(self.context.state, field.name, getattr(loaded, field.name))
            if not self.context.at_end or (self.context.folder.path / "model").is_dir():
                self._saved = self._position  # otherwise the final model is missing, and is saved again
        return Restored(folder, problems)

    def require_recorded(self, restored: Restored) -> None:
        """Raise RunError if there is no checkpoint although the run must have saved one: it would begin again at step
        1, and delete what it recorded.

        Add a problem if the newest checkpoint is older than the last one that must have been saved.
        """
        if not self.enabled:
            return
        path = self.context.folder.path
        saved = saved_step(path)
        if restored.checkpoint is None and saved:
            raise RunError(
                f"{path}: the checkpoint of step {saved} is missing, and all others; restore checkpoints/ from a copy, "
                "or start again with another --out; metrics and tables are unchanged"
            )
        if restored.checkpoint is not None and saved > self.context.state.step and not restored.problems:
            restored.problems.append(f"step-{saved:06d}: is missing")

    def load_tensors(self, checkpoint: Path) -> None:
        """Load a checkpoint's weights and optimizer states."""
        self.models.restore(checkpoint)

    def record_restored(self, restored: Restored, damages: Sequence[str], resumed: bool) -> None:
        """Record problems that were found, and differences from the run that was started."""
        context, step, recorder = self.context, self.context.state.step, self.context.recorder
        for problem in restored.problems:
            recorder.event("checkpoint_unusable", problem, step)
            recorder.note(f"Note: checkpoint {problem}; using the one of step {step} instead")
        for damage in damages:
            recorder.event("damaged", damage, step)
            recorder.note(f"Note: {damage}; training does not depend on it")
        changes = self.parts.changes
        for entry in changes.record(context.folder, context.recipe, step):
            details = {name: value for name, value in entry.items() if name not in ("step", "message")}
            recorder.event(CHANGED, entry["message"], entry["step"], **details)
        for change in changes.lasting:
            recorder.event(CHANGED, f"{change}; {DIFFER}", step)
        for text in changes.texts:
            recorder.note(f"Note: {text}; see events.jsonl")
        compared = comparable_from(context.folder.read_json("environment.json"), context.state.evaluations)
        context.state.evaluations_from = compared
        if restored.checkpoint is None:
            for task, count in self.parts.filtered.items():
                message = f"{count} prompts of {task} are too long and were left out"
                recorder.event("filtered", message, 0, task=task, prompts=count)
            if count := len(self.parts.policy.ids_without_text):
                size = self.parts.policy.head_size
                message = f"the tokenizer has no text for {count} of the {size} token ids that the model can sample"
                recorder.event("ids_without_text", message, 0, ids=count, of=size)
        for halving in (context.folder.read_json("environment.json") or {}).get("halvings", []):
            if halving["step"] > step:  # its own event belongs to steps that are now repeated
                size, after, before = halving["size"], halving["after"], halving["step"]
                message = f"{size} stays at {after}: memory ran out in step {before} before the run was resumed"
                recorder.event("memory", message, step, size=size, after=after)
        if not restored.problems:
            self.drop_old()  # checkpoints that a kill left behind
        if resumed:
            recorder.event("resume", f"continued after step {step}", step)
        self.parts.lost_ranks.record(recorder, context.folder.path, step, self.parts.ranks.size)

    def drop_old(self) -> None:
        """Delete checkpoints that are no longer needed."""
        drop_old(self.context.folder, self.context.state)

    def _save_final_model(self) -> None:
        folder, parts, recipe = self.context.folder, self.parts, self.context.recipe
        with folder.building("model") as path:
            self.models.save_final(path)
        scorer = parts.models.reward_model
        if scorer is not None and scorer.optimizer is not None and recipe.reward_model is not None:
            with folder.building("reward_model") as path:
                self.models.save_reward_model(recipe.reward_model.kind, path)
        if recipe.model.lora is not None:
            with folder.building("adapter") as path:
                self.models.save_adapter(path, recipe.model.name)
