"""What a study found: study.json, the figures and the page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo import __version__
from gruppo.runs.atomic import write_whole
from gruppo.runs.eval_metrics import Question
from gruppo.study.answers import METHOD, Answered, answer, value_of
from gruppo.study.arms import Study, written
from gruppo.study.attempts import read_attempts
from gruppo.study.contamination_check import contamination_of
from gruppo.study.evaluations import final_evaluation, initial_evaluation, plan_evaluations, untrained_models
from gruppo.study.figures import write_figures
from gruppo.study.file import BEFORE, INITIAL, EvaluationSet
from gruppo.study.page import page_of
from gruppo.study.recall_check import recall_of
from gruppo.study.states import RunState, keep_states, start_note

FILE = "study.json"


@dataclass(frozen=True)
class Report:
    """The files of a report. `remarks`: why a folder was used in place of a record, or the other way round."""

    content: Mapping[str, Any]
    json: Path
    page: Path
    figures: list[Path]
    remarks: list[str]


def write_report(study: Study) -> Report:
    """Write study.json, the figures and the page from what is there, and the records that are missing.

    Raises UsageError if something is damaged.
    """
    states = keep_states(study)
    remarks = [f"{state.name}: {remark}" for state in states.values() for remark in state.remarks]
    remarks += [remark for planned in plan_evaluations(study, states) if planned.done and (remark := planned.keep())]
    answered = _answered(study, states)
    study.folder.mkdir(parents=True, exist_ok=True)
    study.page.parent.mkdir(parents=True, exist_ok=True)
    figures = study.page.parent / f"{study.page.stem}-figures"
    drawn = write_figures(study, states, answered, figures)
    content = _content(study, states, answered)
    write_whole(study.folder / FILE, (json.dumps(content, indent=1) + "\n").encode())
    links = {path.stem: os.path.relpath(path, study.page.parent) for path in drawn}
    write_whole(study.page, page_of(study, content, links).encode())
    return Report(content, study.folder / FILE, study.page, drawn, remarks)


def _answered(study: Study, states: Mapping[str, RunState]) -> Answered:
    """The answers of all evaluations that are done."""
    final, initial = {}, {}
    read: dict[Path, list[Question]] = {}
    for table in study.file.evaluations:
        for run in study.runs:
            key = table.title, run.arm.name, run.seed
            before = initial_evaluation(study, table, run, states)
            if before.done:
                if before.folder not in read:
                    read[before.folder] = before.questions()
                initial[key] = (-1 if run.start is None else run.start.seed, read[before.folder])
            if states[run.name].complete and (after := final_evaluation(study, table, run, states[run.name])).done:
                final[key] = after.questions()
    return Answered(final, initial)


def _content(study: Study, states: Mapping[str, RunState], answered: Answered) -> dict[str, Any]:
    """The content of study.json. Durations are in `runs` and `attempts` alone; all else is equal in equal studies."""
    file = study.file
    starts = {run.name: run.start.name for run in study.runs if run.start is not None}
    return {
        "gruppo": __version__,
        "name": file.study.name,
        "title": file.study.title or file.study.name,
        "budget": file.study.budget.given,
        "chosen_on": file.study.chosen_on,
        "recipe": file.recipe,
        "arms": [
            {
                "name": arm.name,
                "label": arm.title,
                "recipe": arm.recipe,
                "changes": written(arm.changes),
                "chosen_on": arm.chosen_on,
                "start": arm.start,
                "budget": file.budget_of(arm).given,
                "seeds": file.seeds_of(arm),
            }
            for arm in file.arms
        ],
        "runs": [_run(state, states.get(starts.get(name, ""))) for name, state in states.items()],
        "attempts": read_attempts(study.records),
        "evaluations": {table.title: _evaluation(study, table, answered) for table in file.evaluations},
        "questions": answer(file, answered),
        "method": METHOD,
        "contamination": contamination_of(study),
        "recall": recall_of(study),
    }


def _run(state: RunState, start: RunState | None) -> dict[str, Any]:
    note = "" if start is None else start_note(state, start)
    return {
        "name": state.name,
        "state": state.state,
        "steps": state.steps,
        "tokens": state.tokens,
        "label_tokens": state.label_tokens,
        "seconds": round(state.seconds, 1),
        "warnings": state.warnings,
        "notes": [*state.notes, *([note] if note else [])],
        "weights_sha256": state.weights,
    }


def _evaluation(study: Study, table: EvaluationSet, answered: Answered) -> dict[str, Any]:
    """The values of every arm, and of the model before training, by metric."""
    metrics = ["accuracy"]
    if table.samples > 1:
        metrics += [f"{kind}@{table.samples}" for kind in ("maj", "pass")]
    found: dict[str, Any] = {"samples": table.samples, "seed": table.seed, "metrics": {}}
    untrained = untrained_models(study, table, [arm.name for arm in study.file.arms])
    for metric in metrics:
        _, kind, k = study.file.parsed(f"{table.title}/{metric}")
        values = {arm.name: value_of(answered.table(table.title, arm.name, kind, k)) for arm in study.file.arms}
        before = {
            title.replace(BEFORE, INITIAL, 1): value_of(answered.table(table.title, arm, kind, k, initial=True))
            for arm, title in untrained
        }
        values = {**before, **values}
        found["metrics"][metric] = {name: value for name, value in values.items() if value is not None}
    return found
