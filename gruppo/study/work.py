"""What is left of a study: the runs to train, and the evaluations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from gruppo.study.arms import PlannedRun, Study
from gruppo.study.evaluations import PlannedEvaluation, evaluations_of, plan_evaluations
from gruppo.study.file import EvaluationSet
from gruppo.study.states import RunState, folder_state, has_model


def work_left(
    study: Study, states: Mapping[str, RunState], only: Collection[str] = ()
) -> tuple[list[PlannedRun], list[PlannedEvaluation]]:
    """The runs to train, and the evaluations that can be done now. `only`: names of arms; all if empty."""
    selected = study.selected(only)
    runs = [run for run in selected if start_of_training(study, run, states) is not None]
    names = {run.name for run in selected}
    planned = [
        evaluation
        for evaluation in plan_evaluations(study, states)
        if not evaluation.done and (evaluation.initial or evaluation.run.name in names)
    ]
    return runs, planned


def start_of_training(study: Study, run: PlannedRun, states: Mapping[str, RunState]) -> RunState | None:
    """The state that the training of a run begins from; None if nothing is to be trained.

    A complete run is trained again if its model is gone, and has not answered everything or is the start of a run that
    is to be trained. The first note says so.
    """
    state = states[run.name]
    if not state.complete:
        return state
    if has_model(run, state):
        return None
    why = []
    if left := unanswered(study, run, state):
        why.append(f"has not answered {', '.join(dict.fromkeys(table.title for table in left))}")
    if waiting := [other.name for other in study.begun_with(run) if _trains(study, other, states)]:
        why.append(f"is the start of {', '.join(waiting)}")
    if not why:
        return None
    found = folder_state(run)
    return replace(found, notes=[f"its model is gone and {' and '.join(why)}, so it is trained again", *found.notes])


def _trains(study: Study, run: PlannedRun, states: Mapping[str, RunState]) -> bool:
    start = start_of_training(study, run, states)
    return start is not None and start.state != "refused"


def unanswered(study: Study, run: PlannedRun, state: RunState) -> list[EvaluationSet]:
    """The evaluations that the model of a run has not answered; all if the run is not complete."""
    planned = evaluations_of(study, run, state)
    return [one.table for one in planned if not state.complete or not one.done]
