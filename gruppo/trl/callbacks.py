"""Callbacks written for transformers' Trainer, called at the moments that a run has.

A step is a step of gruppo: with several updates in it, `state.global_step` grows by their number at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState

from gruppo.errors import UsageError
from gruppo.training.callbacks import STOP, Callback, StopTraining
from gruppo.trl import logs
from gruppo.trl.batches import Batches
from gruppo.trl.configs import TrainingArguments
from gruppo.trl.recipes import Length
from gruppo.types import Group

SERVED = (
    "on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_step_end",
    "on_log", "on_evaluate", "on_save",
)  # fmt: skip
_MISSING: Mapping[str, str] = {
    "on_substep_end": "on_step_end",
    "on_optimizer_step": "on_step_end",
    "on_pre_optimizer_step": "on_step_end",
    "on_prediction_step": "on_evaluate",
    "on_predict": "on_evaluate",
    "on_push_begin": "on_train_end",
}
_UNSERVED = {
    "should_save": "checkpoints are saved every save_steps",
    "should_epoch_stop": "write control.should_training_stop",
}


class Owner(Protocol):
    """What callbacks get of the trainer that they belong to."""

    args: TrainingArguments
    state: TrainerState
    processing_class: Any

    @property
    def running_model(self) -> Any:
        """The model in training, None before and after it."""

    def evaluate(self) -> dict[str, Any]:
        """Evaluate, log, and call on_evaluate."""

    def note(self, text: str) -> None:
        """Show a line."""


def check_callback(callback: Any) -> TrainerCallback:
    """The callback, as an instance. Raises UsageError if it is none, or waits for a moment that a run does not have."""
    callback = callback() if isinstance(callback, type) else callback
    if not isinstance(callback, TrainerCallback):
        raise UsageError(
            f"callbacks: {callback!r} is no TrainerCallback; write class Mine(transformers.TrainerCallback)"
        )
    kind = type(callback)
    for moment, instead in _MISSING.items():
        if getattr(kind, moment, None) is not getattr(TrainerCallback, moment, None):
            raise UsageError(f"callbacks: {kind.__name__}.{moment}: a run has no such moment; write {instead}")
    return callback


class Moments(Callback):
    """Calls the callbacks of a trainer during a run, and logs. `names`: of the reward functions."""

    def __init__(self, owner: Owner, callbacks: Sequence[TrainerCallback]) -> None:
        self.owner, self.callbacks = owner, list(callbacks)
        self.control = TrainerControl()
        self.names: Sequence[str] = ()
        self._said: set[str] = set()
        self._recent: list[dict[str, float]] = []
        self._losses: list[float] = []
        self.batches: Batches | None = None
        self.length: Length | None = None
        self._log_every = self._eval_every = 0

    def plan(self, batches: Batches, length: Length, names: Sequence[str]) -> None:
        """Fix when to log and evaluate. Raises UsageError for a strategy that does not exist."""
        args, state = self.owner.args, self.owner.state
        self.batches, self.length, self.names = batches, length, names
        self._log_every = length.every(batches, args.logging_strategy, args.logging_steps, "logging_strategy")
        self._eval_every = length.every(
            batches, args.eval_strategy, args.eval_steps or args.logging_steps, "eval_strategy"
        )
        state.max_steps = length.steps * batches.updates
        state.num_train_epochs = int(-(-length.steps // (length.per_epoch or length.steps)))
        state.logging_steps, state.eval_steps = self._log_every * batches.updates, self._eval_every * batches.updates
        state.train_batch_size = args.per_device_train_batch_size

    def call(self, moment: str, **more: Any) -> None:
        """Call a method of every callback."""
        owner = self.owner
        for callback in self.callbacks:
            method: Callable[..., Any] = getattr(callback, moment)
            answer = method(
                owner.args,
                owner.state,
                self.control,
                model=owner.running_model,
                processing_class=owner.processing_class,
                tokenizer=owner.processing_class,
                optimizer=None,
                lr_scheduler=None,
                train_dataloader=None,
                eval_dataloader=None,
                **more,
            )
            self.control = self.control if answer is None else answer
            for name, instead in _UNSERVED.items():
                if getattr(self.control, name, False):
                    setattr(self.control, name, False)
                    self._say(f"{type(callback).__name__} sets control.{name}, which has no effect: {instead}")

    def _say(self, text: str) -> None:
        """Show a note, once."""
        if text not in self._said:
            self._said.add(text)
            self.owner.note(text)

    def begin(self) -> None:
        """The run begins."""
        self.control.should_training_stop = False
        self.call("on_train_begin")
        self._begin_step()
        if self.owner.args.eval_on_start and self._eval_every:
            self.owner.evaluate()

    def end(self, metrics: Mapping[str, float]) -> None:
        """The run is over: log its summary."""
        self.log(dict(metrics))
        self.call("on_train_end")

    @property
    def mean_loss(self) -> float:
        """The mean of the losses of all steps so far; 0 without any."""
        return sum(self._losses) / len(self._losses) if self._losses else 0.0

    def _begin_step(self) -> None:
        if self._ends_epoch(round(self.owner.state.global_step / self._updates)):
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    @property
    def _updates(self) -> int:
        assert self.batches is not None
        return self.batches.updates

    def _ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with a step; the start of the first one counts as the end of one."""
        assert self.length is not None
        return step % (self.length.per_epoch or self.length.steps) == 0

    def on_step(self, step: int, metrics: dict[str, Any], groups: Sequence[Group]) -> StopTraining | None:
        """See `gruppo.Callback`."""
        assert self.length is not None
        state = self.owner.state
        state.global_step = step * self._updates
        state.epoch = step / (self.length.per_epoch or self.length.steps)
        state.num_input_tokens_seen += logs.tokens_of(groups)
        found = logs.of_step(metrics, groups, self.names)
        self._recent.append(found)
        self._losses.append(found["loss"])
        self.call("on_step_end")
        at_end = step == self.length.steps or self.control.should_training_stop
        first = step == 1 and self.owner.args.logging_first_step
        if first or self.control.should_log or (self._log_every and step % self._log_every == 0):
            self._log_recent()
        if self._ends_epoch(step):
            self.call("on_epoch_end")
        if self.control.should_evaluate or (
            self._eval_every and (step % self._eval_every == 0 or (at_end and self.owner.args.eval_strategy == "steps"))
        ):
            self.control.should_evaluate = False
            self.owner.evaluate()
        if at_end or self.control.should_training_stop:
            return STOP if self.control.should_training_stop else None
        self._begin_step()
        return None

    def on_checkpoint(self, step: int, path: Path) -> StopTraining | None:
        """See `gruppo.Callback`."""
        self.owner.state.save_to_json(str(path.parent.parent / "trainer_state.json"))
        self.call("on_save")
        return STOP if self.control.should_training_stop else None

    def _log_recent(self) -> None:
        self.control.should_log = False
        averages = logs.averaged(self._recent)
        self._recent = []
        self.log({**averages, "num_tokens": self.owner.state.num_input_tokens_seen})

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to `state.log_history`, and call on_log."""
        state = self.owner.state
        if state.epoch is not None:
            values.setdefault("epoch", state.epoch)
        state.log_history.append({**values, "step": state.global_step})
        self.call("on_log", logs=values)
