"""The table of what is left of a study, with its estimated time."""

from __future__ import annotations

from collections.abc import Collection

from gruppo.study.arms import Study
from gruppo.study.estimate import Estimator, clock, total
from gruppo.study.runner import work_left
from gruppo.study.states import read_states
from gruppo.utils.progress import Progress


def describe_plan(study: Study, only: Collection[str], progress: Progress, checks: bool = True) -> str:
    """All runs and evaluations with their states, as text, and the estimated time of what is left.

    `checks`: estimate arms that have not run with `gruppo check`, which loads their models.
    """
    states = read_states(study)
    estimator = Estimator(study, states, progress, checks)
    runs, evaluations = work_left(study, states, only)
    left = {run.name for run in runs}
    rows: list[tuple[str, ...]] = [("run", "state", "steps", "sampled tokens", "left")]
    seconds: list[float | None] = []
    for run in study.runs:
        state = states[run.name]
        estimate = estimator.run(run) if run.name in left and state.state != "refused" else None
        seconds.append(estimate)
        shown = clock(estimate) if run.name in left else ""
        rows.append((run.name, state.state, f"{state.steps:,}", f"{state.tokens:,}", shown))
    for name, state in states.items():
        if state.state == "left over":
            rows.append((name, state.state, f"{state.steps:,}", f"{state.tokens:,}", ""))
    waiting = [planned.table for planned in evaluations] + [table for _ in runs for table in study.file.evaluations]
    times = [estimator.evaluation(table) for table in waiting]
    lines = [_line(row, rows) for row in rows]
    lines += [f"  {name}: {note}" for name, state in states.items() for note in state.notes if name in left]
    lines.append(f"{len(runs)} of {len(study.runs)} runs and {len(waiting)} evaluations are left: about "
                 f"{clock(total([*seconds, *times]))}")  # fmt: skip
    if any(value is None for value in [*seconds, *times]) and (runs or waiting):
        lines[-1] += ", and what has no estimate yet"
    return "\n".join(lines)


def _line(row: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(other[place]) for other in rows) for place in range(len(row))]
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
