"""Find every \\boxed{…} of a text."""

from __future__ import annotations

import re
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(-?[\w.]+))")


class Box(NamedTuple):
    """A box: its span in the text (`start`, `end`) and its content."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""Every \boxed{…} or \fbox{…} (braces balanced) that is closed and not empty, and \boxed followed by a word."""
    closing = _closing(text) if "\\" in text else {}
    found = []
    for box in _BOX.finditer(text):
        if box[1] is not None:
            found.append(Box(box.start(), box.end(), box[1]))
        elif (end := closing.get(box.end() - 1)) is not None and text[box.end() : end].strip():
            found.append(Box(box.start(), end + 1, text[box.end() : end].strip()))
    return found


def _closing(text: str) -> dict[int, int]:
    r"""Index of the closing brace for every opening brace, in one pass; \{ and \} do not count."""
    opened: list[int] = []
    pairs: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            pairs[opened.pop()] = brace.start()
    return pairs


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


_JOINED = re.compile(
    r"[\s$.,;\\()]*(?:\\text\{ *(?:and|or) *\}|and|or|[,;，；、和或])[\s$\\()]*(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?"
)


def last_box(text: str) -> tuple[int, str] | None:
    """(start, content) of the last box; None if there is none.

    Boxes that "and", "or" or a comma connect to it are included, separated by commas.
    """
    found = boxes(text)
    if not found:
        return None
    start, _, joined = found[-1]
    for before in reversed(found[:-1]):
        if start - before.end > _JOIN or not _JOINED.fullmatch(text, before.end, start):
            break
        start, joined = before.start, f"{before.content}, {joined}"
    return start, joined


_JOIN = 40  # maximum characters between boxes that belong together
