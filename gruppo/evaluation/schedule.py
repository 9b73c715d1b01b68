"""Evaluation during training: when sets are due, and what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from gruppo.engines.base import Engine
from gruppo.evaluation.runner import Evaluation, Sampler, run_eval_set
from gruppo.evaluation.sets import EvalSet
from gruppo.runs.eval_metrics import figure_metrics
from gruppo.runs.folder import RunFolder
from gruppo.runs.recorder import Recorder
from gruppo.runs.tables import EVALUATIONS
from gruppo.utils.signals import Stop


class Evaluated(Protocol):
    """The part of a run's state that evaluations change.

    `evaluated`: the evaluation due at this step is done. `evaluations`: figures by step. `benchmarks`: figures by step
    and benchmark name.
    """

    step: int
    evaluated: bool
    evaluations: dict[str, dict[str, Any]]
    benchmarks: dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class EvalSchedule:
    """Runs the evaluation sets of a recipe before the first step, every `every` steps of a set, and at the end.

    `notify`: called with step, figures and rows of each evaluation, for callbacks. `ready`: a context in which the
    engine has the weights of the current step, and samples nothing else.
    """

    sets: Sequence[EvalSet]
    engine: Engine
    sample: Sampler
    seed: int
    state: Evaluated
    folder: RunFolder
    recorder: Recorder
    stop: Stop
    notify: Callable[[int, dict[str, Any], list[dict[str, Any]]], None]
    ready: Callable[[], AbstractContextManager[None]] = nullcontext

    def due(self, step: int, at_end: bool) -> list[EvalSet]:
        """The sets that are evaluated after this step."""
        return [eval_set for eval_set in self.sets if eval_set.due(step, at_end)]

    def run_due(self, at_end: bool) -> None:
        """Run the sets that are due. Writes a table of all answers and a line of metrics, and updates the state."""
        state, start = self.state, time.monotonic()
        due = self.due(state.step, at_end)
        if state.evaluated or not due:
            return
        with self.ready(), self.stop.interruptible():
            results = [
                run_eval_set(eval_set, self.engine, self.seed, self.recorder, self.stop, self.sample)
                for eval_set in due
            ]
        self.engine.sleep()
        all_rows = [result.rows() for result in results]
        self.folder.table("evaluations", state.step, list(chain(*all_rows)), EVALUATIONS)
        values: dict[str, Any] = {"step": state.step}
        all_figures = [result.figures() for result in results]
        for result, figures in zip(results, all_figures, strict=True):
            name = result.eval_set.name
            if name:
                state.benchmarks.setdefault(str(state.step), {})[name] = figures
            else:
                state.evaluations[str(state.step)] = figures
            values |= figure_metrics(f"eval/{name}/" if name else "eval/", figures)
            self._record_ambiguous(result)
        values["time/evaluate"] = time.monotonic() - start
        self.recorder.step(values)
        state.evaluated = True
        for result, figures, rows in zip(results, all_figures, all_rows, strict=True):
            self.notify(state.step, {"eval_set": result.eval_set.name, **figures}, rows)

    def _record_ambiguous(self, result: Evaluation) -> None:
        """Record an event if extraction rules disagree on some answers."""
        pairs = zip(result.eval_set.prompts, result.verdicts, strict=True)
        prompt_ids = [prompt.id for prompt, verdicts in pairs if any(verdict.ambiguous for verdict in verdicts)]
        if prompt_ids:
            count = sum(verdict.ambiguous for verdicts in result.verdicts for verdict in verdicts)
            message = f"ambiguous answer extraction: {count} of {len(result.completions)} answers; see evaluations/"
            self.recorder.event(
                "ambiguous_answer", message, self.state.step, eval_set=result.eval_set.name, prompt_ids=prompt_ids
            )
