"""The evaluations of a run: when they are due, and what they record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from gruppo.engines.base import Engine
from gruppo.evaluation.metrics import figure_metrics
from gruppo.evaluation.runner import Evaluation, Sampler, hold
from gruppo.evaluation.sets import EvalSet
from gruppo.runs.folder import RunFolder
from gruppo.runs.recorder import Recorder
from gruppo.runs.tables import EVALUATIONS
from gruppo.utils.signals import Stop


class Evaluated(Protocol):
    """What a run's state keeps of its evaluations: figures by step; `evaluated`: the evaluation that is due at this
    step is done."""

    step: int
    evaluated: bool
    evaluations: dict[str, dict[str, Any]]
    benchmarks: dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class EvalSchedule:
    """Runs the evaluation sets of a recipe before the first step, every so many steps, and at the end.

    `tell`: called with step, figures and rows of each evaluation, for callbacks.
    """

    sets: Sequence[EvalSet]
    engine: Engine
    sample: Sampler
    seed: int
    state: Evaluated
    folder: RunFolder
    recorder: Recorder
    stop: Stop
    tell: Callable[[int, dict[str, Any], list[dict[str, Any]]], None]

    def run_due(self, at_end: bool) -> None:
        """Run the sets that are due: a table of all their answers, a line of metrics, and the figures in the state."""
        state, start = self.state, time.monotonic()
        due = [each for each in self.sets if each.due(state.step, at_end)]
        if state.evaluated or not due:
            return
        with self.stop.interruptible():
            results = [hold(each, self.engine, self.seed, self.recorder, self.stop, self.sample) for each in due]
        rows = [result.rows() for result in results]
        self.folder.table("evaluations", state.step, list(chain(*rows)), EVALUATIONS)
        values: dict[str, Any] = {"step": state.step}
        figures = [result.figures() for result in results]
        for result, own in zip(results, figures, strict=True):
            name = result.exam.name
            if name:
                state.benchmarks.setdefault(str(state.step), {})[name] = own
            else:
                state.evaluations[str(state.step)] = own
            values |= figure_metrics(f"eval/{name}/" if name else "eval/", own)
            self._record_ambiguous(result)
        values["time/evaluate"] = time.monotonic() - start
        self.recorder.step(values)
        state.evaluated = True
        for result, own, own_rows in zip(results, figures, rows, strict=True):
            self.tell(state.step, {"eval_set": result.exam.name, **own}, own_rows)

    def _record_ambiguous(self, result: Evaluation) -> None:
        """An event for the answers that extraction rules read differently."""
        pairs = zip(result.exam.prompts, result.verdicts, strict=True)
        asked = [prompt.id for prompt, own in pairs if any(verdict.ambiguous for verdict in own)]
        if asked:
            count = sum(verdict.ambiguous for own in result.verdicts for verdict in own)
            message = f"rules of extraction disagree on {count} of {len(result.completions)} answers; see evaluations/"
            self.recorder.event(
                "ambiguous_answer", message, self.state.step, eval_set=result.exam.name, prompt_ids=asked
            )
