"""Running what is missing of a study."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gruppo.errors import RunError, UsageError, first_line, out_of_memory
from gruppo.study.arms import PlannedRun, Study, require_arms
from gruppo.study.attempts import attempt
from gruppo.study.contamination_check import check_contamination
from gruppo.study.estimate import Estimator, clock
from gruppo.study.evaluations import PlannedEvaluation, evaluations_of, plan_evaluations
from gruppo.study.recall_check import measure_recall, recall_left
from gruppo.study.spending import BudgetCallback
from gruppo.study.states import RunState, has_model, keep_state, keep_states
from gruppo.study.work import start_of_training, work_left
from gruppo.training.api import run_recipe
from gruppo.training.callbacks import Callback
from gruppo.types import Group
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Interrupted, Stop


@dataclass
class Outcome:
    """What happened to the work of a study.

    `failed`: names of what failed, with the reason. `left`: names of what is not done, because it failed or because
    there was no time for it.
    """

    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class StudyRunner:
    """Trains the runs of a study one after another, and evaluates each after its training.

    `minutes`: begin nothing that would take longer than what is left of them, and interrupt a run that does.
    """

    def __init__(
        self, study: Study, progress: Progress, stop: Stop, minutes: float | None = None, only: Collection[str] = ()
    ) -> None:
        """Raises UsageError for an arm that does not exist."""
        self.study, self.progress, self.stop, self.only = study, progress, stop, only
        require_arms(study, only)
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Do everything that is missing and fits. Raises Interrupted after a signal, when everything is saved."""
        self._guarded("contamination", lambda: check_contamination(self.study, self.progress))
        states = keep_states(self.study)
        for planned in recall_left(self.study):
            self._measure_recall(planned)
        for planned in plan_evaluations(self.study, states):
            if planned.done:
                self._keep(planned)
        for planned in work_left(self.study, states, self.only)[1]:
            self._evaluate(planned)
        for run in self.study.selected(self.only):
            if (begun := start_of_training(self.study, run, states)) is not None:
                self._train(run, begun, states)
                states[run.name] = keep_state(self.study, run)
            if states[run.name].complete and start_of_training(self.study, run, states) is None:
                for planned in evaluations_of(self.study, run, states[run.name]):
                    self._evaluate(planned)
        return self.outcome

    def _train(self, run: PlannedRun, begun: RunState, states: dict[str, RunState]) -> None:
        if begun.state == "refused":
            self._fail(run.name, "; ".join(begun.notes))
            return
        if not self._has_start(run, states):
            return
        seconds = Estimator(self.study, states, self.progress, checks=self.deadline is not None).run(run, begun)
        if not self._fits(seconds):
            self._leave(run.name, _no_time(seconds))
            return
        callbacks: list[Callback] = [] if run.budget.steps else [BudgetCallback(run.budget, run.folder)]
        if self.deadline is not None:
            callbacks.append(_Deadline(self.deadline, self.stop))
        self.progress.note(f"Study {self.study.file.study.name}: {run.name}")

        def train(record: dict[str, Any]) -> None:
            with _without_options(run):
                result, _ = run_recipe(
                    run.recipe, callbacks=callbacks, out=run.folder, resume=True, progress=self.progress
                )
            record["outcome"] = result.summary["state"]
            if record["outcome"] == "interrupted":
                raise Interrupted

        self._attempt(run.name, train)

    def _has_start(self, run: PlannedRun, states: Mapping[str, RunState]) -> bool:
        """Whether the model is there that a run begins with. If not, report it."""
        start = run.start
        if start is None or has_model(start, states[start.name]):
            return True
        if start.name in self.outcome.failed:
            self._fail(run.name, f"it begins with {start.name}, which failed: {self.outcome.failed[start.name]}")
        else:
            self._leave(run.name, f"it begins with {start.name}, which is not trained yet")
        return False

    def _measure_recall(self, planned: PlannedEvaluation) -> None:
        name = f"recall of {planned.table.title}"
        if not self._fits(None):
            self._leave(name, _no_time(None))
            return
        self.progress.note(f"Study {self.study.file.study.name}: {name}")

        def measure(record: dict[str, Any]) -> None:
            with self.stop.interruptible():
                measure_recall(self.study, planned, self.progress, self.stop)
            record["outcome"] = "done"

        self._attempt(name, measure)

    def _evaluate(self, planned: PlannedEvaluation) -> None:
        if planned.done or planned.name in self.outcome.left:
            return
        states = {run.name: RunState(run.name) for run in self.study.runs}
        seconds = Estimator(self.study, states, self.progress, checks=False).evaluation(planned.table)
        if not self._fits(seconds):
            self._leave(planned.name, _no_time(seconds))
            return
        self.progress.note(f"Study {self.study.file.study.name}: evaluation {planned.name}")

        def evaluate(record: dict[str, Any]) -> None:
            with self.stop.interruptible():
                planned.perform(self.progress, self.stop)
            record["outcome"] = "done"

        self._attempt(planned.name, evaluate)
        if planned.done:
            self._keep(planned)

    def _keep(self, planned: PlannedEvaluation) -> None:
        def keep() -> None:
            if remark := planned.keep():
                self.progress.note(f"Study {self.study.file.study.name}: {remark}")

        self._guarded(planned.name, keep)

    def _attempt(self, name: str, work: Any) -> None:
        def recorded() -> None:
            with attempt(self.study.records, name) as record:
                try:
                    work(record)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    message = f"out of memory ({first_line(error)}); free some memory, and start the study again"
                    raise RunError(message) from error

        self._guarded(name, recorded)
        self.stop.check()

    def _guarded(self, name: str, work: Any) -> None:
        """Do some work; a failure does not end the study."""
        try:
            work()
        except (UsageError, RunError, OSError) as error:
            self._fail(name, first_line(error))

    def _fail(self, name: str, why: str) -> None:
        self.progress.note(f"Study {self.study.file.study.name}: {name} failed: {why}")
        self.outcome.failed[name] = why
        self.outcome.left.append(name)

    def _fits(self, seconds: float | None) -> bool:
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        return left > (seconds or 0.0)

    def _leave(self, name: str, why: str) -> None:
        self.progress.note(f"Study {self.study.file.study.name}: {name} is left: {why}")
        self.outcome.left.append(name)


@contextmanager
def _without_options(run: PlannedRun) -> Iterator[None]:
    """Errors inside name the run's folder in place of the options of `gruppo train`, which a study does not have."""
    try:
        yield
    except (UsageError, RunError) as error:
        fix = f"delete {run.folder} to train it from the start"
        error.args = (re.sub(r"(start again with|choose) another --out", fix, str(error)).removeprefix("--resume: "),)
        raise


def _no_time(seconds: float | None) -> str:
    return f"there is no time for it ({clock(seconds)})"


class _Deadline(Callback):
    """Requests a stop after the last step that ends before a deadline, if the next takes as long as the longest."""

    def __init__(self, deadline: float, stop: Stop) -> None:
        self.deadline, self.stop, self.longest = deadline, stop, 0.0

    def on_step(self, step: int, metrics: dict[str, Any], groups: list[Group]) -> None:  # type: ignore[override]
        """See `Callback`."""
        self.longest = max(self.longest, metrics["time/step"])
        if time.monotonic() + self.longest > self.deadline:
            self.stop.request()
