"""The last lines that a process has written: in its log, or on its standard error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gruppo.errors import one_line

LAST_BYTES = 4096  # in which the last lines are looked for
_WORDS_LINES, _WORDS_CHARACTERS = 3, 300


def last_lines(written: bytes) -> list[str]:
    """The lines at the end of what was written, without empty ones. What is no UTF-8 is replaced."""
    text = written[-LAST_BYTES:].decode("utf-8", "replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def last_lines_of(path: Path) -> list[str]:
    """The lines at the end of a file; none if it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LAST_BYTES))
            return last_lines(stream.read())
    except OSError:
        return []


def last_words(lines: Sequence[str]) -> str:
    """The last three lines in one, of at most 300 characters, in which nothing is invisible."""
    return one_line(" / ".join(line.strip() for line in lines[-_WORDS_LINES:]))[-_WORDS_CHARACTERS:]
