"""What a run has spent, step by step, and the callback that ends it when it reaches its budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gruppo.runs.missing import STEP
from gruppo.runs.reading import read_metrics, read_table, step_of
from gruppo.runs.tables import LABELS, ROLLOUTS
from gruppo.study.file import Budget
from gruppo.training.callbacks import STOP, Callback, StopTraining
from gruppo.types import Group


def tokens_by_step(folder: Path) -> dict[int, int]:
    """The sampled tokens of every step of a run: all that the model wrote, also in groups that were dropped."""
    schema = pa.schema([ROLLOUTS.field("mask")])
    return {step: _true(read_table(path, schema)["mask"]) for step, path in _tables(folder / "rollouts")}


def label_tokens_by_step(folder: Path) -> dict[int, int]:
    """The tokens that were sampled for labels of a reward model, by the step after which they were sampled: those of
    the completions and of the continuations of their steps, which older folders do not count."""
    schema = pa.schema([LABELS.field("token_ids"), LABELS.field("continuation_tokens")])
    return {step: _labelling(read_table(path, schema)) for step, path in _tables(folder / "labels")}


def seconds_by_step(metrics: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The seconds of training of every step of a run, with that of a reward model before it and without evaluations.

    `metrics`: the lines of metrics.jsonl. A reward model's line has the number of the step before it.
    """
    seconds: dict[int, float] = {}
    for line in metrics:
        is_step = STEP in line
        step, spent = line["step"] + (not is_step), line.get("time/step" if is_step else "time/reward_model")
        if spent is not None:
            seconds[step] = seconds.get(step, 0.0) + spent
    return seconds


def reached_at(budget: Budget, spent: Mapping[int, float]) -> int | None:
    """The step with which a run reaches its budget, given what each step spends of it; None if it does not."""
    total = 0.0
    for step, amount in sorted(spent.items()):
        total += amount
        if step and total >= _limit(budget):
            return step
    return None


def spent_by_step(budget: Budget, tokens: Mapping[int, int], metrics: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """What every step of a run has spent, in the unit of the budget; of minutes, the seconds.

    `tokens`: see `tokens_by_step`. `metrics`: the lines of metrics.jsonl.
    """
    if budget.unit == "minutes":
        return seconds_by_step(metrics)
    return dict(tokens) if budget.unit == "tokens" else dict.fromkeys(tokens, 1.0)


def _limit(budget: Budget) -> float:
    return 60 * budget.amount if budget.unit == "minutes" else budget.amount


class BudgetCallback(Callback):
    """Stops a run after the step with which it reaches its budget of tokens or minutes; also if it was interrupted at
    that step.

    Tokens are counted from the run's folder when it starts, and minutes after every step, so a resumed run stops where
    it would have.
    """

    def __init__(self, budget: Budget, folder: Path) -> None:
        self.budget, self.folder, self.spent = budget, folder, 0.0

    @property
    def reason(self) -> str:
        """Why the run stops."""
        return f"the budget of {self.budget} is spent"

    def on_start(self, step: int) -> StopTraining | None:
        """See `Callback`."""
        if self.budget.unit == "minutes":
            return self._stop_by_minutes(step)
        self.spent = sum(amount for number, amount in tokens_by_step(self.folder).items() if number <= step)
        return STOP if step and self.spent >= _limit(self.budget) else None

    def on_step(self, step: int, metrics: dict[str, Any], groups: Sequence[Group]) -> StopTraining | None:
        """See `Callback`."""
        if self.budget.unit == "minutes":
            return self._stop_by_minutes(step)
        self.spent += sum(sum(completion.mask) for group in groups for completion in group.completions)
        return STOP if self.spent >= _limit(self.budget) else None

    def _stop_by_minutes(self, step: int) -> StopTraining | None:
        seconds = seconds_by_step(read_metrics(self.folder / "metrics.jsonl"))
        seconds = {number: amount for number, amount in seconds.items() if number <= step}
        return STOP if reached_at(self.budget, seconds) is not None else None


def _labelling(table: pa.Table) -> int:
    return len(pc.list_flatten(table["token_ids"])) + int(pc.sum(table["continuation_tokens"]).as_py() or 0)


def _true(masks: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.list_flatten(masks)).as_py() or 0)


def _tables(folder: Path) -> list[tuple[int, Path]]:
    found = [(step_of(path), path) for path in sorted(folder.glob("step-*.parquet"))]
    return [(step, path) for step, path in found if step is not None]
