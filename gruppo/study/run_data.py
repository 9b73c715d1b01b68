"""What a study needs to know of a run, read from its folder or from its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.runs.changes import steps_and_iterations
from gruppo.runs.folder import checkpoint_folders
from gruppo.runs.missing import missing_parts
from gruppo.runs.reading import lines_in, metrics_in, read_lines, read_metrics, read_object, reading
from gruppo.runs.status import read_status
from gruppo.study.record_files import files_in, read_record, write_record
from gruppo.study.spending import label_tokens_by_step, tokens_by_step

COMPLETE = ("done", "stopped")
_FILES = ("recipe.toml", "environment.json", "summary.json", "metrics.jsonl", "events.jsonl")


@dataclass(frozen=True)
class RunData:
    """What a study needs to know of a run.

    `recipe`: the text of its recipe.toml. `outcome`: how it ended, "unfinished" if it did not; `steps`: how many it
    has; `at`: the step at which it was last seen, if it failed. `saved`: the steps and the outer iterations that its
    last checkpoint has. `metrics`, `events`: the lines of its files. `tokens`: sampled by step; `label_tokens`: sampled
    for labels of a reward model, by the step before them. `weights`: the hash of the trained model's; `begun_with`: of
    the model's before training, and `dtype` theirs ("" if not known). `missing`: what its folder lacks, in words; of a
    run that has not ended, nothing.
    """

    recipe: str
    outcome: str
    steps: int
    at: int
    saved: tuple[int, int]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    tokens: Mapping[int, int]
    label_tokens: Mapping[int, int]
    weights: str
    begun_with: str
    dtype: str
    missing: list[str]

    @property
    def ending(self) -> tuple[str, int, str]:
        """What says whether two runs with one recipe are the same."""
        return self.outcome, self.steps, self.weights


def read_folder(folder: Path) -> RunData:
    """What is in a run folder. Raises UsageError if it is damaged."""
    outcome, steps, weights = read_ending(folder)
    status, environment = read_status(folder), folder / "environment.json"
    begun_with, dtype = _beginning(read_object(environment) if environment.is_file() else {})
    return RunData(
        recipe=(folder / "recipe.toml").read_text(encoding="utf-8"),
        outcome=outcome,
        steps=steps,
        at=steps if status is None else status.step,
        saved=steps_and_iterations(checkpoint_folders(folder)),
        metrics=read_metrics(folder / "metrics.jsonl"),
        events=read_lines(folder / "events.jsonl"),
        tokens=tokens_by_step(folder),
        label_tokens=label_tokens_by_step(folder),
        weights=weights,
        begun_with=begun_with,
        dtype=dtype,
        missing=missing_parts(folder) if outcome in COMPLETE else [],
    )


def read_ending(folder: Path) -> tuple[str, int, str]:
    """How the run in a folder ended, "unfinished" if it did not; the number of its steps; the hash of its weights."""
    summary = read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    status = read_status(folder)
    if status is not None and status.state == "running":  # it went on after its last summary
        return "unfinished", max(checkpoint_folders(folder), default=0), ""
    return _ending(summary)


def _ending(summary: Mapping[str, Any]) -> tuple[str, int, str]:
    steps = summary.get("steps", 0)
    weights = str(summary.get("weights_sha256") or "")
    return str(summary.get("state", "unfinished")), steps if type(steps) is int else 0, weights


def _beginning(environment: Mapping[str, Any]) -> tuple[str, str]:
    """The hash of the weights that a run began with, and their dtype; "" for what is not known."""
    return str(environment.get("start_weights_sha256", "")), str(environment.get("chosen", {}).get("dtype", ""))


def keep_run(folder: Path, data: RunData, record: Path) -> None:
    """Write the record of the run in a folder, which ended."""
    facts = {
        "iterations": data.saved[1],
        "tokens": {str(step): count for step, count in data.tokens.items()},
        "label_tokens": {str(step): count for step, count in data.label_tokens.items()},
        "missing": data.missing,
    }
    write_record(record, facts, files_in(folder, _FILES))


def read_kept_run(folder: Path) -> RunData | None:
    """What is in the record of a run; None if there is none. Raises UsageError if it is damaged."""
    record = read_record(folder, "train")
    if record is None:
        return None
    with reading(folder, f"restore it from a copy, or delete {folder} to train again"):
        outcome, steps, weights = _ending(json.loads(record.files["summary.json"]))
        facts, files = record.facts, record.files
        begun_with, dtype = _beginning(json.loads(files.get("environment.json", b"{}")))
        return RunData(
            recipe=files["recipe.toml"].decode(),
            outcome=outcome,
            steps=steps,
            at=steps,
            saved=(steps, int(facts["iterations"])),
            metrics=metrics_in(files.get("metrics.jsonl", b""), folder / "metrics.jsonl"),
            events=lines_in(files.get("events.jsonl", b""), folder / "events.jsonl"),
            tokens={int(step): int(count) for step, count in facts["tokens"].items()},
            label_tokens={int(step): int(count) for step, count in facts["label_tokens"].items()},
            weights=weights,
            begun_with=begun_with,
            dtype=dtype,
            missing=[str(text) for text in facts["missing"]],
        )
