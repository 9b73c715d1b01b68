"""What is there of the runs of a study: which are done, and which have another recipe than the study's file says."""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from gruppo.config.loading import load_recipe
from gruppo.config.renames import translate_recipe
from gruppo.config.resume import FREE, LENGTH, MEMORY
from gruppo.errors import UsageError, first_line
from gruppo.runs.changes import differences, length_problem
from gruppo.runs.reading import reading
from gruppo.study.arms import PlannedRun, Study
from gruppo.study.record_files import MANIFEST
from gruppo.study.run_data import COMPLETE, RunData, keep_run, read_ending, read_folder, read_kept_run
from gruppo.study.spending import reached_at, seconds_by_step, spent_by_step


@dataclass(frozen=True)
class RunState:
    """What is there of a run.

    `state`: "missing", "unfinished", "failed", "refused", "left over", "done" (all steps), or "stopped" (at its
    budget). `tokens`: sampled; `label_tokens`: sampled for labels of a reward model, besides. `notes`: what is odd
    about the run, in words. `warnings`: the names of the warnings that it gave. `weights`: the hash of the trained
    model's. `recorded`: whether all this comes from its record. `remarks`: why it comes from there, or from the folder,
    if both exist and differ; they are no part of the results. `data`: what was read; None if nothing was.
    """

    name: str
    state: str = "missing"
    steps: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    weights: str = ""
    recorded: bool = False
    remarks: list[str] = field(default_factory=list)
    data: RunData | None = field(default=None, repr=False)

    @property
    def complete(self) -> bool:
        """Whether its results count."""
        return self.state in COMPLETE


def read_states(study: Study) -> dict[str, RunState]:
    """The state of every run of a study, by name, and of runs that are there but not in the study's file."""
    states = {run.name: read_state(study, run) for run in study.runs}
    found = [path.parent for path in study.folder.glob("*/seed-*/recipe.toml")]
    found += [path.parent for path in study.records.glob(f"*/seed-*/{MANIFEST}")]
    for arm, seed in sorted({(folder.parent.name, folder.name) for folder in found}):
        if (name := f"{arm}/{seed}") not in states:
            states[name] = _left_over(study, name)
    return states


def keep_states(study: Study) -> dict[str, RunState]:
    """The same. Every run that is complete, or left over and ended, has a record afterwards."""
    return {name: _kept(study, state) for name, state in read_states(study).items()}


def keep_state(study: Study, run: PlannedRun) -> RunState:
    """The state of a run. If it is complete, it has a record afterwards."""
    return _kept(study, read_state(study, run))


def _kept(study: Study, state: RunState) -> RunState:
    ended = state.complete or (state.state == "left over" and state.data and state.data.outcome in COMPLETE)
    if state.recorded or not ended:
        return state
    assert state.data is not None
    keep_run(study.folder / state.name, state.data, study.records / state.name)
    return replace(state, recorded=True)


def read_state(study: Study, run: PlannedRun) -> RunState:
    """The state of a run, from its record or its folder.

    The record counts if it is complete, unless the folder has a complete run that ended otherwise: the folder has more
    than the record. If the record is not complete, the folder counts, if there is one.
    """
    record, damage = study.records / run.name, ""
    kept = RunState(run.name)
    try:
        if (data := read_kept_run(record)) is not None:
            kept = replace(_judged(run, data), recorded=True)
    except UsageError as error:
        damage = str(error)
    if kept.complete and (_is_in_folder(run, kept) or not (run.folder / "recipe.toml").is_file()):
        return kept
    found = folder_state(run)
    if found.complete:
        return replace(found, remarks=_why_folder(record, kept, found, damage))
    if kept.complete:
        other = found.notes[0] if found.state == "refused" else f"{found.state}, with {found.steps} steps"
        why = f"the record is used, because it is complete, and the folder is not ({other})"
        return replace(kept, remarks=[f"{why}; to go on with the folder, delete {record}"])
    if found.state != "missing":
        return replace(found, remarks=[damage] if damage else [])
    if damage:
        return RunState(run.name, "refused", notes=[damage])
    if kept.state in ("missing", "refused"):
        return kept
    why = f"its record ends at step {kept.steps}, before it is complete, and its folder is gone"
    return RunState(run.name, remarks=[f"{why}, so it is trained from the start"])


def has_model(run: PlannedRun, state: RunState) -> bool:
    """Whether a run is complete, and its folder has the model that its training ended with."""
    return state.complete and run.model.is_dir() and _is_in_folder(run, state)


def _is_in_folder(run: PlannedRun, state: RunState) -> bool:
    """Whether the run in the folder ended as this state says."""
    with suppress(UsageError):
        return state.data is not None and read_ending(run.folder) == state.data.ending
    return False


def _why_folder(record: Path, kept: RunState, found: RunState, damage: str) -> list[str]:
    """Why a complete folder is used in place of a record; nothing if there is none, or if the run only went on."""
    end = "the folder is used, and the record is written again"
    if damage:
        return [f"{damage}; {end}"]
    if kept.state == "refused":
        return [f"{record}: {kept.notes[0]}; {end}"]
    if kept.complete:
        differ = " and ".join(f"{one.steps} steps with weights {one.weights[:12]}" for one in (kept, found))
        return [f"record and folder have different runs ({differ}); {end}, because the folder has everything"]
    return []


def _left_over(study: Study, name: str) -> RunState:
    """The state of a run that is not in the study's file."""
    note = "is not in the study's file; its results are not used"
    try:
        data = read_kept_run(study.records / name)
    except UsageError as error:
        if not (study.folder / name / "recipe.toml").is_file():
            return RunState(name, "left over", notes=[note, str(error)])
        data = None
    if data is not None:
        return replace(_described(data, name, "left over", [note]), recorded=True)
    try:
        return _described(read_folder(study.folder / name), name, "left over", [note])
    except (UsageError, OSError) as error:
        return RunState(name, "left over", notes=[note, first_line(error)])


def folder_state(run: PlannedRun) -> RunState:
    """The state of what is in the folder of a run."""
    if not (run.folder / "recipe.toml").is_file():
        return RunState(run.name)
    try:
        with reading(run.folder, "restore it, or delete it to train again"):
            return _judged(run, read_folder(run.folder))
    except UsageError as error:
        return RunState(run.name, "refused", notes=[str(error)])


def _judged(run: PlannedRun, data: RunData) -> RunState:
    """The state of a planned run of which this is there."""
    if problem := refusal(run, data):
        return _described(data, run.name, "refused", [problem])
    budget = run.budget
    spent = spent_by_step(budget, data.tokens, data.metrics)
    reached = reached_at(budget, {step: amount for step, amount in spent.items() if step <= data.steps}) is not None
    epochs = run.recipe.run.epochs is not None  # the number of steps follows from the data
    whole = data.outcome == "done" if epochs else data.steps >= run.recipe.run.steps
    ended = data.outcome in COMPLETE and (reached or whole)
    notes = []
    if data.outcome == "failed":
        notes.append(f"failed in step {data.at + 1}")
    if ended and not reached:
        notes.append(f"its {data.steps} steps ended before its budget of {budget}")
    state = data.outcome if ended or data.outcome == "failed" else "unfinished"
    return _described(data, run.name, state, notes)


def _described(data: RunData, name: str, state: str, notes: list[str]) -> RunState:
    found = dict.fromkeys(str(event.get("warning", "")) for event in data.events if event["kind"] == "warning")
    resumed = sum(event["kind"] == "resume" for event in data.events)
    notes = [*notes, *([f"resumed {resumed} times"] if resumed else []), *(data.missing if state in COMPLETE else [])]
    return RunState(
        name,
        state,
        data.steps,
        sum(data.tokens.values()),
        sum(data.label_tokens.values()),
        sum(seconds_by_step(data.metrics).values()),
        notes,
        [warning for warning in found if warning],
        data.weights,
        data=data,
    )


def refusal(run: PlannedRun, data: RunData) -> str | None:
    """Why what is there of a planned run is not that run, in words; None if it is, or can become it.

    Fields that change nothing that the run computes may differ, and so may the place of the folder of its start. A run
    can go on to a larger budget.
    """
    with reading(run.folder / "recipe.toml", "restore the recipe of the run"):
        before = load_recipe(translate_recipe(tomllib.loads(data.recipe)))
    budget, found = run.budget, differences(before, run.recipe)
    if run.start is not None and _last_names(before.model.name) == _last_names(run.recipe.model.name):
        found = [change for change in found if change.field != "model.name"]
    fix = "restore it, or give the arm another name"
    changed = [
        change
        for change in found
        if change.rule not in (FREE, LENGTH, MEMORY) or change.of_evaluation or change.field == "model.name"
    ]
    if changed:
        return f"{'; '.join(change.message for change in changed)}; {fix}"
    length = [change for change in found if change.rule == LENGTH and run.recipe.run.epochs is None]
    if length and (problem := length_problem(before, run.recipe, *data.saved)):
        return f"{'; '.join(change.message for change in length)}: {problem}; {fix}"
    reached = reached_at(budget, spent_by_step(budget, data.tokens, data.metrics))
    if reached is not None and data.steps > reached:
        return f"its budget is {budget}, which it reached with step {reached}, but it has {data.steps} steps; {fix}"
    return None


def _last_names(model: str) -> list[str]:
    """What the folder of the model of a run has the same on all machines: arm, seed and "model"."""
    return re.split(r"[/\\]", model)[-3:]


def start_note(run: RunState, start: RunState) -> str:
    """That a run began with other weights than its start has now, in words; "" if it did not, or if nothing is known.

    The start may have been trained again elsewhere, where rounding differs. The results of the run count all the same.
    """
    if run.data is None or not run.data.begun_with or not start.complete or start.data is None:
        return ""
    begun, there = (f"weights {weights[:12]}" for weights in (run.data.begun_with, start.weights))
    if run.data.dtype != start.data.dtype:
        return (
            f"began with {begun} in {run.data.dtype}, which cannot be compared with those of its start, in "
            f"{start.data.dtype}"
        )
    same = run.data.begun_with == start.weights
    return "" if same else f"began with {begun}, and the start that is there has {there}"
