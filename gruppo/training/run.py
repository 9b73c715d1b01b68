"""A training run: assembles its parts, restores it, and does what is needed around every step and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from gruppo.engines.probe import largest_drift
from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.evaluation.schedule import EvalSchedule
from gruppo.models.reward_model import NAME as REWARD_MODEL
from gruppo.rollout.ahead import Ahead
from gruppo.rollout.environments.client import NAME as ENVIRONMENT
from gruppo.rollout.live import LiveRollouts
from gruppo.rollout.metrics import describe_groups, describe_staleness
from gruppo.rollout.offline import OfflineRollouts
from gruppo.rollout.reward_model import RewardModelScorer
from gruppo.rollout.sampled_step import SampledStep, read_sampled
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.source import RolloutSource, Step
from gruppo.runs.atomic import WriteError
from gruppo.runs.missing import base_problem, metric_problems
from gruppo.runs.reading import reading
from gruppo.runs.recorder import FileSink, Recorder, Sink, StatusSink
from gruppo.runs.status import StatusFile
from gruppo.runs.tables import ROLLOUTS, ROLLOUTS_AHEAD, rollout_rows
from gruppo.runs.warnings import WarningMonitor
from gruppo.training.callbacks import Callbacks
from gruppo.training.checkpoint import State
from gruppo.training.checkpointer import Checkpointer
from gruppo.training.context import RunContext
from gruppo.training.iterations import Iterations
from gruppo.training.nonfinite import FiniteGuard
from gruppo.training.policy_trainer import StepBatches
from gruppo.training.reward_audit import RewardAudit
from gruppo.training.setup import RunComponents
from gruppo.training.summary import summarize
from gruppo.training.trackers import Trackers
from gruppo.training.trainers import make_trainers
from gruppo.types import Group
from gruppo.utils.oom_retry import SizeReduced
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.signals import Interrupted, Stop
from gruppo.utils.system import peak_memory, release_memory
from gruppo.utils.waiting import waiting_for

# Builds the source of a run's groups from the default source.
MakeSource = Callable[[LiveRollouts], RolloutSource]


class TrainingRun:
    """State of a training run.

    `source`: builds the source of its rollouts from the default source. `saves`: False for a run that saves no
    checkpoints and no final model.
    """

    def __init__(
        self,
        parts: RunComponents,
        console: Progress,
        stop: Stop,
        callbacks: Callbacks | None = None,
        source: MakeSource | None = None,
        saves: bool = True,
    ) -> None:
        self.parts, self.recipe, self.method, self.folder = parts, parts.recipe, parts.recipe.method, parts.run
        self.stop, self.callbacks, self.state = stop, callbacks or Callbacks(), State()
        self.reward_weights = _reward_weights(parts)
        self.status = StatusFile(parts.run.path, self.recipe.run.steps)
        drift = largest_drift(parts.policy.dtype)  # see docs/metrics.md
        sinks: list[Sink] = [FileSink(parts.run), StatusSink(self.status)]
        self.recorder = Recorder(console, sinks, WarningMonitor(self.reward_weights, drift))
        self.context = RunContext(self.recipe, parts.run, self.state, self.recorder, stop, self.callbacks)
        self.trackers = Trackers(self.context)
        guard = FiniteGuard(self.context, parts.policy.tokenizer)
        trainers = make_trainers(self.recipe, parts.models, parts.sizes, guard, self.recorder, parts.ranks)
        self.policy, self.value_model = trainers.policy, trainers.value_model
        self.checkpointer = Checkpointer(self.context, parts, trainers.files, self.status, enabled=saves)
        _record_reductions(parts, self.recorder, self.state)
        self.audit = _reward_audit(parts)
        lag = self.recipe.lag if source is None else 0
        halt = Stop() if lag else stop
        self.source = self._source(trainers.scorer, source, halt, lag)
        self.rollouts = Ahead(
            self.source, parts.engine, self.policy.weights, lag, self.recipe.run.steps, self.recorder, stop, halt,
            parts.copies,
        )  # fmt: skip
        self.checkpointer.sampled_ahead = lambda: self.rollouts.sampled_after(self.state.step)
        self.iterations = Iterations(
            self.context, self.policy, trainers.reward_model, self.rollouts, parts.prompts, self.checkpointer, guard,
            parts.sizes,
        )  # fmt: skip
        self.evaluations = EvalSchedule(
            parts.eval_sets,
            parts.engine,
            sample_groups if parts.episodes is None else parts.episodes.sample,
            self.recipe.run.seed,
            self.state,
            parts.run,
            self.recorder,
            stop,
            lambda *arguments: self.callbacks.notify("on_evaluation", *arguments),
            self.rollouts.engine_with_live_weights,
        )
        self._advance: Advance = lambda _: None  # the progress bar over all steps, while it is shown
        self._without_advantage = 0  # steps in a row without a nonzero advantage
        self._lengths: dict[str, int] = {}  # of the append-only files, when no work was half done

    def _source(
        self, scorer: RewardModelScorer | None, source: MakeSource | None, stop: Stop, lag: int
    ) -> RolloutSource:
        parts = self.parts
        if parts.pool is None:
            size = self.recipe.sampling.prompts_per_step
            return OfflineRollouts(parts.prompts, parts.offline, size, self.method.mask_truncated)
        live = LiveRollouts(
            recipe=self.recipe,
            prompts=parts.prompts,
            engine=parts.sampler,
            multi_turn=parts.episodes,
            pool=parts.pool,
            scorer=scorer,
            audit=self.audit,
            tokenizer=parts.policy.tokenizer,
            params=parts.sampling,
            weights=self.reward_weights,
            folder=self.folder.path,
            recorder=self.recorder,
            stop=stop,
            streamed=parts.hosts is not None,
            save=(lambda: "the last checkpoint is intact") if lag else self._save_before_error,
        )
        return live if source is None else source(live)

    def _save_before_error(self) -> str:
        self.checkpointer.save()
        return "everything before it is saved"

    # Start and end of a run.

    def execute(self, train: Callable[[TrainingRun], None]) -> dict[str, Any]:
        """Restore, train, and write the summary, even after an interruption or a failure. Returns the summary."""
        with self.stop.interruptible():
            self.restore()
        self.trackers.start()
        outcome = "failed"
        try:
            with self.recorder.bar("Training", self.recipe.run.steps, "steps") as self._advance:
                self._advance(self.state.step)
                outcome = _trained(self, train)
        except Interrupted:
            if not self.iterations.learning:  # otherwise the run continues from the earlier checkpoint
                self.folder.cut_back(self._lengths, self.state.step)
                self.checkpointer.save()
            outcome = "interrupted"
        except Exception as error:
            if self.callbacks.failed:  # callbacks are only called when no work is half done
                self.checkpointer.save()
            elif out_of_memory(error):
                message = f"out of memory ({first_line(error)}); free some memory, and resume from the last checkpoint"
                raise RunError(message) from error
            raise
        finally:
            self.rollouts.close()
            self.checkpointer.note_memory()
            lost = outcome == "failed" and self.parts.ranks.size > 1  # the other ranks may have ended
            weights = None if lost else dict(self.policy.weights)
            summary = summarize(outcome, self.state, self.parts.eval_sets, weights)
            with suppress(*[WriteError] if outcome == "failed" else []):  # the original failure takes precedence
                self.folder.write_json("summary.json", summary)
            self.status.update(now=True, state=outcome, step=self.state.step)
            with suppress(*[WriteError] if outcome == "failed" else []):
                self.trackers.finish()
        return summary

    def restore(self) -> None:
        """Go back to the newest intact checkpoint, or to the beginning, and undo later changes in the folder."""
        restored = self.checkpointer.restore()
        self.checkpointer.require_recorded(restored)
        if restored.checkpoint is not None:
            self.iterations.restore_reference(restored.checkpoint)
            self.checkpointer.load_tensors(restored.checkpoint)
        begun = bool(self.folder.lengths()["metrics.jsonl"])
        with reading(self.folder.path, "restore the folder as the run left it, or choose another --out"):
            damages = self.folder.cut_back(self.state.lengths, self.state.step)
            damages += self.folder.table_problems("rollouts", range(1, self.state.step + 1))
            damages += self.folder.table_problems("evaluations", map(int, self.state.evaluations))
            damages += _missing(self, tuple(damages))
            lines = self.folder.metrics()
        _record_restarts(self.parts, self.recorder, self.state)
        saved = 0 if restored.checkpoint is None else self.state.step
        self.status.update(now=True, step=self.state.step, checkpoint=saved, truncated_to=self.folder.lengths())
        self.rollouts.begin(self.state.step, _sampled(self, restored.checkpoint))
        self._let_unused_engine_sleep()
        self.checkpointer.record_restored(restored, damages, resumed=restored.checkpoint is not None or begun)
        with reading(self.folder.path, "restore the folder as the run left it, or choose another --out"):
            for values in lines:  # for warnings that look back; their messages are already recorded
                if "eval/accuracy" not in values or values["step"] >= self.state.evaluations_from:
                    self.recorder.see_again(values)
                if self.audit is not None:
                    self.audit.alarm(values)

    def record_wait(self, text: str, over: bool) -> None:
        """Record that the run waits for something, or that it is over. Called by another thread."""
        self.recorder.event("waiting", text, self.state.step + 1, state="passed" if over else "begins")

    # Steps.

    def remaining_steps(self) -> Iterator[int]:
        """Yield the number of the next step until the run ends.

        Between two steps no work is half done, so here the run evaluates, saves and ends.
        """
        while True:
            self._lengths = self.folder.lengths()
            self.evaluations.run_due(self.context.at_end)
            self._lengths = self.folder.lengths()  # with the evaluation, which is not repeated
            at_end = self.context.at_end
            if at_end or (self.state.step and self.state.step % self.recipe.run.checkpoint_every == 0):
                self.checkpointer.save()
            if at_end:
                return
            if self.callbacks.stopped:  # by on_checkpoint just now: save again as the last one, with the final model
                self.checkpointer.forget()
                continue
            self.stop.check()
            yield self.state.step + 1

    def start_step(self, number: int) -> Step:
        """A step with empty metrics and timings."""
        return Step(number, self.state.cursor)

    def load_weights(self, step: Step) -> None:
        """Let the engine have the policy's weights after a step. An evaluation that is due comes first."""
        with step.timer("load_weights"), waiting_for("the engine, to load weights"):
            at_end = step.number == self.recipe.run.steps
            self.rollouts.weights_changed(step.number, offered=not self.evaluations.due(step.number, at_end))
            self._let_unused_engine_sleep()

    def _let_unused_engine_sleep(self) -> None:
        """The engine holds memory of the device after it has loaded weights. It may rest unless the next step samples
        from the policy."""
        if not self.parts.samples_policy:
            self.parts.engine.sleep()

    def finish_step(self, step: Step, groups: list[Group], minibatches: Sequence[StepBatches]) -> None:
        """Record the step (rollouts, metrics, warnings), mark it as done, and notify the callbacks."""
        release_memory()
        self.policy.keep_logprobs(minibatches)
        self._describe(step, groups)
        self._record_failures(step, groups, bool(minibatches))
        with step.timer("write"):
            rows = rollout_rows(step.number, groups, self.parts.policy.tokenizer)
            self.folder.table("rollouts", step.number, rows, ROLLOUTS_AHEAD if self.recipe.lag else ROLLOUTS)
        self.state.train_seconds += step.timer.total
        values = _reduced(step, groups)
        self.recorder.step(values)
        alarm = self.audit and self.audit.alarm(values)
        if alarm:
            self.recorder.event("audit", alarm, step.number)
            self.recorder.note(f"Step {step.number}: {alarm}")
        self.state.step, self.state.cursor = step.number, self.state.cursor + len(groups)
        self.state.evaluated = False
        self.trackers.check()
        self.callbacks.notify("on_step", step.number, values, groups)
        self._advance(1)

    def _describe(self, step: Step, groups: Sequence[Group]) -> None:
        metrics, parts = step.metrics, self.parts
        describe_groups(groups, metrics, len(parts.prompts.parts) > 1, parts.policy.ids_without_text)
        if self.recipe.lag:
            describe_staleness(groups, step.number, metrics)
        metrics.mean("optimizer/learning_rate", self.policy.rate(step))
        metrics.maximum("memory/peak_bytes", peak_memory(parts.policy.device))
        metrics.maximum("memory/micro_batch_tokens", parts.sizes.micro_batch_tokens)
        if parts.fleet is not None:
            parts.fleet.observe(metrics)

    def _record_failures(self, step: Step, groups: Sequence[Group], updated: bool) -> None:
        """Record events for rewards that failed, and for a step without nonzero advantages."""
        self.rollouts.record_failures(step, groups)
        failed = sum(reward.failure is not None for group in groups for reward in group.rewards)
        if failed:
            self.recorder.note(
                f"Step {step.number}: {failed} completions are excluded because a reward failed; see events.jsonl"
            )
        if not any(group.has_nonzero_advantage for group in groups):
            reasons = sorted({group.skipped for group in groups if group.skipped})
            only = "only the KL term moves the policy" if updated else "the policy is not updated"
            message = f"no group of this step has a nonzero advantage ({'; '.join(reasons)}), so {only}"
            self.recorder.event("no_nonzero_advantage", message, step.number)
            self._without_advantage += 1
            if self._without_advantage & (self._without_advantage - 1) == 0:  # the 1st, 2nd, 4th, 8th … in a row
                steps = f" ({self._without_advantage} steps in a row)" if self._without_advantage > 1 else ""
                self.recorder.note(f"Step {step.number}: {message}{steps}")
        else:
            self._without_advantage = 0


def _trained(run: TrainingRun, train: Callable[[TrainingRun], None]) -> str:
    """Train to the end. Returns the outcome: "done", or "stopped" if a callback has ended the run; it is recorded."""
    run.callbacks.notify("on_start", run.state.step)
    if run.callbacks.stopped:
        run.checkpointer.forget()  # save again, with the final model
    train(run)
    if run.state.step == run.recipe.run.steps:
        return "done"
    run.recorder.event("stopped", run.callbacks.reason, run.state.step)
    return "stopped"


def _sampled(run: TrainingRun, checkpoint: Path | None) -> list[SampledStep]:
    """The steps after a checkpoint that the run has sampled already."""
    if checkpoint is None or not run.rollouts.lag:
        return []
    return read_sampled(checkpoint, run.parts.prompts, run.state.cursor)


def _missing(run: TrainingRun, known: Sequence[str]) -> Iterator[str]:
    """Descriptions of further parts that are missing from the folder of a run. `known`: descriptions so far."""
    if not any(problem.startswith("metrics.jsonl") for problem in known):
        yield from metric_problems(run.folder.metrics(), run.state.step)
    if run.state.step and (problem := base_problem(run.folder.path)):
        yield f"{problem}, and gruppo export needs it"


def _reduced(step: Step, groups: Sequence[Group]) -> dict[str, Any]:
    """The line of metrics of a step."""
    metrics, phases = step.metrics, {**step.beside, **step.timer.seconds}
    for name, seconds in phases.items():
        metrics.mean(f"time/{name}", seconds)
    metrics.mean("time/step", step.timer.total)
    if generation := phases.get("generate"):
        tokens = sum(sum(completion.mask) for group in groups for completion in group.completions)
        metrics.mean("time/tokens_per_second", tokens, generation)
    return {"step": step.number, **metrics.reduce()}


def _reward_weights(parts: RunComponents) -> dict[str, float]:
    """The weights of everything that scores completions, by name."""
    weights = dict(zip(parts.pool.names, parts.pool.weights, strict=True)) if parts.pool else {}
    if parts.episodes is not None and parts.episodes.weight is not None:
        weights[ENVIRONMENT] = parts.episodes.weight
    settings = parts.recipe.reward_model
    return weights | ({REWARD_MODEL: settings.weight} if settings else {})


def _reward_audit(parts: RunComponents) -> RewardAudit | None:
    settings = parts.recipe.audit
    return RewardAudit(parts.audit, settings, parts.recipe.run.seed) if parts.audit is not None and settings else None


def _record_restarts(parts: RunComponents, recorder: Recorder, state: State) -> None:
    """From now on, record why a worker process, an engine or a reward host is started again. Some may have been
    already."""

    def restarted(message: str) -> None:
        happened("worker_restarted", message)

    def happened(kind: str, message: str) -> None:
        step = state.step + 1
        recorder.event(kind, message, step)
        recorder.note(f"Step {step}: {message}")

    for actors in (parts.fleet, parts.hosts):
        if actors is not None:
            actors.notify = happened
            while actors.untold:
                happened(*actors.untold.pop(0))
    for pool in (parts.pool, parts.audit, parts.episodes):
        if pool is not None:
            pool.notify_of_restarts(restarted)


def _record_reductions(parts: RunComponents, recorder: Recorder, state: State) -> None:
    """From now on, write a size that is reduced to environment.json, so that a resumed run keeps it."""

    writing = Lock()  # sampling and training may run out of memory at the same time

    def reduced(what: SizeReduced) -> None:
        with writing:
            step, environment = state.step + 1, parts.run.read_json("environment.json") or {}
            halvings = [*environment.get("halvings", []), {"step": step, **asdict(what)}]
            chosen = {**environment.get("chosen", {}), what.size: what.after}
            parts.run.write_json("environment.json", {**environment, "chosen": chosen, "halvings": halvings})
        recorder.event("memory", str(what), step, **asdict(what))
        recorder.note(f"Step {step}: {what}")

    parts.sizes.on_reduced = reduced
