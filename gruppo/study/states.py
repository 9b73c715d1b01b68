"""What is there of the runs of a study: which are done, and which have another recipe than the study's file says."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gruppo.config.loading import load_recipe
from gruppo.config.renames import translate_recipe
from gruppo.config.resume import FREE, LENGTH, MEMORY
from gruppo.errors import UsageError
from gruppo.runs.changes import allowed_changes, differences
from gruppo.runs.folder import checkpoint_folders
from gruppo.runs.missing import missing_parts
from gruppo.runs.reading import read_lines, read_object, reading
from gruppo.runs.status import read_status
from gruppo.study.arms import PlannedRun, Study
from gruppo.study.file import Budget
from gruppo.study.spending import (
    label_tokens_by_step,
    reached_at,
    seconds_by_step,
    spent_by_step,
    tokens_by_step,
)

COMPLETE = ("done", "stopped")


@dataclass(frozen=True)
class RunState:
    """What is there of a run.

    `state`: "missing", "unfinished", "failed", "refused", "done" (all steps), or "stopped" (at its budget). `tokens`:
    sampled; `label_tokens`: sampled for labels of a reward model, besides. `notes`: what is odd about it, in words.
    `warnings`: the names of the warnings that it gave. `weights`: the hash of the trained model's.
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

    @property
    def complete(self) -> bool:
        """Whether its results count."""
        return self.state in COMPLETE


def read_states(study: Study) -> dict[str, RunState]:
    """The state of every run of a study, by name, and of folders that no run of the study's file belongs to."""
    states = {run.name: read_state(run, study.budget) for run in study.runs}
    for folder in sorted(study.folder.glob("*/seed-*")):
        name = f"{folder.parent.name}/{folder.name}"
        if (folder / "recipe.toml").is_file() and name not in states:
            note = "is not in the study's file; its results are not used"
            states[name] = _described(folder, name, "left over", [note])
    return states


def read_state(run: PlannedRun, budget: Budget) -> RunState:
    """The state of a run of a study."""
    if not (run.folder / "recipe.toml").is_file():
        return RunState(run.name)
    try:
        with reading(run.folder, "restore it, or delete it to train again"):
            return _read_state(run, budget)
    except UsageError as error:
        return RunState(run.name, "refused", notes=[str(error)])


def _read_state(run: PlannedRun, budget: Budget) -> RunState:
    outcome, steps = _outcome(run.folder)
    if problem := refusal(run, budget, steps):
        return _described(run.folder, run.name, "refused", [problem])
    spent = spent_by_step(budget, run.folder)
    reached = reached_at(budget, {step: amount for step, amount in spent.items() if step <= steps}) is not None
    ended = outcome in COMPLETE and (reached or steps >= run.recipe.run.steps)
    notes = []
    if outcome == "failed":
        status = read_status(run.folder)
        notes.append(f"failed in step {(status.step if status else steps) + 1}")
    if ended and not reached:
        notes.append(f"its {steps} steps ended before its budget of {budget}")
    state = outcome if ended or outcome == "failed" else "unfinished"
    return _described(run.folder, run.name, state, notes)


def _outcome(folder: Path) -> tuple[str, int]:
    """How a run ended, "unfinished" if it did not, and the number of its steps."""
    summary = read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    status, steps = read_status(folder), summary.get("steps", 0)
    if status is not None and status.state == "running":  # it went on after its last summary
        return "unfinished", max(checkpoint_folders(folder), default=0)
    return str(summary.get("state", "unfinished")), steps if type(steps) is int else 0


def _described(folder: Path, name: str, state: str, notes: list[str]) -> RunState:
    events = read_lines(folder / "events.jsonl")
    found = dict.fromkeys(str(event.get("warning", "")) for event in events if event["kind"] == "warning")
    resumed = sum(event["kind"] == "resume" for event in events)
    _, steps = _outcome(folder)
    notes = [*notes, *([f"resumed {resumed} times"] if resumed else []), *_odd(folder, state)]
    weights = ""
    with suppress(OSError, UsageError):
        weights = str(read_object(folder / "summary.json").get("weights_sha256") or "")
    return RunState(
        name,
        state,
        steps,
        sum(tokens_by_step(folder).values()),
        sum(label_tokens_by_step(folder).values()),
        sum(seconds_by_step(folder).values()),
        notes,
        [warning for warning in found if warning],
        weights,
    )


def _odd(folder: Path, state: str) -> Iterator[str]:
    if state in COMPLETE:
        yield from missing_parts(folder)


def refusal(run: PlannedRun, budget: Budget, steps: int) -> str | None:
    """Why the run in the folder of a planned run is not that run, in words; None if it is, or can become it.

    Fields that change nothing that the run computes may differ. A run can go on to a larger budget.
    """
    file = run.folder / "recipe.toml"
    with reading(file, "restore the recipe of the run"):
        before = load_recipe(translate_recipe(tomllib.loads(file.read_text(encoding="utf-8"))))
    found = differences(before, run.recipe)
    fix = "restore it, or give the arm another name"
    changed = [
        change
        for change in found
        if change.rule not in (FREE, LENGTH, MEMORY) or change.of_evaluation or change.field == "model.name"
    ]
    if changed:
        return f"{'; '.join(change.message for change in changed)}; {fix}"
    if any(change.rule == LENGTH for change in found):
        try:
            allowed_changes(run.folder, before, run.recipe, checkpoint_folders(run.folder))
        except UsageError as error:
            return str(error)
    reached = reached_at(budget, spent_by_step(budget, run.folder))
    if reached is not None and steps > reached:
        return f"its budget is {budget}, which it reached with step {reached}, but it has {steps} steps; {fix}"
    return None
