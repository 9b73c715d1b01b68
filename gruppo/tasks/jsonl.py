"""Rows of a JSON Lines file: one object a line, with a `prompt` and any more columns."""

from __future__ import annotations

import json

from gruppo.errors import UsageError
from gruppo.tasks import data_file
from gruppo.types import Row


def load(split: str, path: str) -> list[Row]:
    """All rows of the file. Raises UsageError for "test" (a file has no held-out part) and for a line that is no
    JSON object."""
    if split == "test":
        raise UsageError('a file has no held-out part; name the questions with evaluation.task = "other.jsonl"')
    rows = []
    try:
        lines = data_file(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file cannot be read ({error}); give a readable UTF-8 file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UsageError(f"line {number} is {str(row)[:40]!r}; write one object a line")
        rows.append(row)
    return rows
