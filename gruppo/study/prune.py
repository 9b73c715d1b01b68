"""Deleting the folders of runs whose results are recorded."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from gruppo.errors import UsageError
from gruppo.runs.folder import RunFolder, foreign_entries
from gruppo.study.arms import PlannedRun, Study, require_arms
from gruppo.study.evaluations import evaluations_of, plan_evaluations
from gruppo.study.run_data import read_folder
from gruppo.study.states import RunState, keep_states, read_states
from gruppo.utils.disk import gigabytes, held_bytes

_ASIDE = ".deleted-"


def prune(study: Study, only: Collection[str] = ()) -> list[str]:
    """Delete the folders of runs whose record, and the records of all their evaluations, are complete, unless other
    runs are to begin with their models.

    The missing records of what is done are written before. `only`: names of arms; all if empty. Returns a line for
    every folder of a run, deleted or not, and one with the space that is free now. Raises UsageError for an arm that
    does not exist, and if an evaluation is damaged.
    """
    require_arms(study, only)
    for half in study.folder.glob(f"{_ASIDE}*"):  # a kill has left it
        shutil.rmtree(half)
    keep_states(study)
    states = read_states(study)
    for planned in plan_evaluations(study, states):
        if planned.done:
            planned.keep()
    lines, total = [], 0
    for run in study.runs:
        if not run.folder.is_dir() or (only and run.arm.name not in only):
            continue
        if why := _why_not(study, run, states):
            lines.append(f"{run.name}: not deleted: {why}")
            continue
        freed = held_bytes(run.folder)
        try:
            _delete(study, run.folder)
        except UsageError as error:
            lines.append(f"{run.name}: not deleted: {error}")
            continue
        total += freed
        lines.append(f"{run.name}: deleted {run.folder} ({gigabytes(freed)}); its record has its results")
    return [*lines, f"{gigabytes(total)} freed"]


def _why_not(study: Study, run: PlannedRun, states: Mapping[str, RunState]) -> str:
    """Why the folder of a run is not deleted; "" if it can be."""
    state = states[run.name]
    if not state.complete or state.data is None:
        return f"the run is {state.state}"
    if left := dict.fromkeys(one.table.title for one in evaluations_of(study, run, state) if not one.kept):
        return f"its model has not answered {', '.join(left)}; run the study first"
    if waiting := [other.name for other in study.begun_with(run) if not states[other.name].complete]:
        return f"{', '.join(waiting)} will begin with its model; run the study first"
    try:
        found = read_folder(run.folder)
    except (UsageError, OSError) as error:
        return str(error)
    for name in ("ending", "metrics", "tokens", "label_tokens"):
        if getattr(found, name) != getattr(state.data, name):
            return f"its {name} are not those of its record; delete {run.folder} yourself if the record is right"
    if others := foreign_entries(run.folder):
        return f"{run.folder / others[0]} was not written by the run; move it elsewhere"
    return ""


def _delete(study: Study, folder: Path) -> None:
    """Delete a run folder; after a kill it is there as a whole, or not at all. Raises UsageError if a run uses it."""
    held = RunFolder(folder)
    try:
        aside = study.folder / f"{_ASIDE}{folder.parent.name}-{folder.name}"
        folder.rename(aside)
        shutil.rmtree(aside)
    finally:
        held.close()
