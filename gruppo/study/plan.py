"""The table of what is left of a study, with its estimated time."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gruppo.study.arms import Study, require_arms
from gruppo.study.estimate import Estimator, clock, total
from gruppo.study.evaluations import plan_evaluations
from gruppo.study.recall_check import recall_left
from gruppo.study.states import RunState, read_states, start_note
from gruppo.study.work import start_of_training, unanswered, work_left
from gruppo.utils.progress import Progress


def describe_plan(study: Study, only: Collection[str], progress: Progress, checks: bool = True) -> str:
    """All runs and evaluations with their states, as text, and the estimated time of what is left.

    `only`: names of arms; all if empty. `checks`: estimate arms that have not run with `gruppo check`, which loads
    their models. Raises UsageError for an arm that does not exist.
    """
    require_arms(study, only)
    states = read_states(study)
    estimator = Estimator(study, states, progress, checks)
    runs, evaluations = work_left(study, states, only)
    remarks = [f"{state.name}: {remark}" for state in states.values() for remark in state.remarks]
    remarks += _remarks_on_starts(study, states, only)
    remarks += [remark for planned in plan_evaluations(study, states) if (remark := planned.remark)]
    times: list[float | None] = []
    left = {}
    for run in runs:
        start = start_of_training(study, run, states)
        assert start is not None
        remarks += [f"{run.name}: {note}" for note in start.notes]
        times.append(None if start.state == "refused" else estimator.run(run, start))
        left[run.name] = clock(times[-1])
    waiting = [planned.table for planned in evaluations]
    waiting += [table for run in runs for table in unanswered(study, run, states[run.name])]
    times += [estimator.evaluation(table) for table in waiting]
    rows: list[tuple[str, ...]] = [("run", "state", "from", "steps", "sampled tokens", "left")]
    for name, state in states.items():
        source = _source(study, state)
        rows.append((name, state.state, source, f"{state.steps:,}", f"{state.tokens:,}", left.get(name, "")))
    lines = [_line(row, rows) for row in rows] + [f"  {remark}" for remark in remarks]
    lines += [f"  recall of {planned.table.title} is left" for planned in recall_left(study)]
    lines.append(f"{len(runs)} of {len(study.runs)} runs and {len(waiting)} evaluations are left: about "
                 f"{clock(total(times))}")  # fmt: skip
    if any(value is None for value in times):
        lines[-1] += ", and what has no estimate yet"
    return "\n".join(lines)


def _remarks_on_starts(study: Study, states: Mapping[str, RunState], only: Collection[str]) -> list[str]:
    """What a reader should know of the arms that begin with others, and of their runs."""
    remarks = [f"{arm.name} begins with {arm.start}" for arm in study.file.arms if arm.start is not None]
    for arm in dict.fromkeys(run.arm.name for run in study.selected(only)):
        if only and arm not in only:
            remarks.append(f"{arm} is included, because --only {' --only '.join(only)} begins with it")
    for run in study.selected(only):
        if run.start is None:
            continue
        if note := start_note(states[run.name], states[run.start.name]):
            remarks.append(f"{run.name}: {note}")
        if states[run.start.name].state == "refused" and not states[run.name].complete:
            remarks.append(f"{run.name}: is not trained, because {run.start.name} is refused")
    return remarks


def _source(study: Study, state: RunState) -> str:
    """What a state comes from: "folder", "record" (the folder is gone), or "record and folder"."""
    if state.data is None:
        return ""
    if not state.recorded:
        return "folder"
    return "record and folder" if (study.folder / state.name).is_dir() else "record"


def _line(row: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(other[place]) for other in rows) for place in range(len(row))]
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
