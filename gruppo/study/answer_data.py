"""The answers of an evaluation, as far as a study needs them, read from its folder or from its record.

A record has one line per question: its `id`, a hash of its text (`question`), and of every answer whether it is
`correct`, its `votes` (equal answers have equal votes), its number of sampled `tokens`, and how it `ended`. It does not
have the texts of the answers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from gruppo.errors import UsageError
from gruppo.evaluation.results import RESULTS
from gruppo.runs.eval_metrics import Question
from gruppo.runs.reading import lines_in, object_of, read_object, read_table, reading, require_own
from gruppo.runs.tables import EVALUATIONS
from gruppo.study.record_files import Record, files_in, read_record, write_record

_ANSWERS = "answers.jsonl"
_FILES = ("recipe.toml", "environment.json", RESULTS)
_COLUMNS = pa.schema(
    [EVALUATIONS.field(name) for name in ("prompt_id", "question", "correct", "vote", "finish_reason", "mask")]
)


def read_questions(folder: Path, record: Path) -> list[Question]:
    """The questions of an evaluation with their answers, from its record, or from its folder if that counts (see
    `kept_answers`). Their texts are hashes.

    Raises UsageError if neither can be read, or if there are none.
    """
    kept, _ = kept_answers(folder, record)
    lines = _lines(folder) if kept is None else lines_in(kept.files[_ANSWERS], record / _ANSWERS)
    with reading(record, f"restore it from a copy, or delete {record} to evaluate again"):
        return [Question(line["id"], line["question"], line["correct"], line["votes"]) for line in lines]


def keep_answers(folder: Path, record: Path) -> str:
    """Write the record of an evaluation that is done, unless it is there.

    Returns why it replaces another record, "" if it does not. Raises UsageError if both are damaged.
    """
    kept, remark = kept_answers(folder, record)
    if kept is None:
        content = "".join(json.dumps(line) + "\n" for line in _lines(folder))
        write_record(record, {}, {**files_in(folder, _FILES), _ANSWERS: content.encode()})
    return remark


def kept_answers(folder: Path, record: Path) -> tuple[Record | None, str]:
    """The record of an evaluation, and "". If there is a folder, and the record is damaged or has other results: None,
    and why the folder counts.

    Raises UsageError if the record is damaged, and there is no folder.
    """
    has_folder, end = (folder / RESULTS).is_file(), "the folder is used, and the record is written again"
    try:
        kept = read_record(record, "evaluate")
    except UsageError as error:
        if not has_folder:
            raise
        return None, f"{error}; {end}"
    if kept is None or not has_folder:
        return kept, ""
    before = object_of(kept.files.get(RESULTS, b"")) or {}
    if before.get("sets") == read_object(folder / RESULTS).get("sets"):
        return kept, ""
    return None, f"{record}: its results are not those of {folder}; {end}, because the folder has everything"


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of the record of the evaluation in a folder. Raises UsageError if it is damaged."""
    require_own(folder)
    lines: dict[str, dict[str, Any]] = {}
    for row in read_table(folder / "samples.parquet", _COLUMNS).to_pylist():
        if (name := row["prompt_id"]) not in lines:
            text = hashlib.sha256(row["question"].encode("utf-8", "replace")).hexdigest()[:16]
            lines[name] = {"id": name, "question": text, "correct": [], "votes": [], "tokens": [], "ended": []}
        lines[name]["correct"].append(row["correct"])
        lines[name]["votes"].append(row["vote"])
        lines[name]["tokens"].append(sum(row["mask"]))
        lines[name]["ended"].append(row["finish_reason"])
    return list(lines.values())
