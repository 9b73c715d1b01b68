"""Find every \\boxed{…} of a text."""

from __future__ import annotations

import re
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)\s*+(?:\{|(-?[\w.]++))")
LONGEST = 5000  # maximum characters of a box's content


class Box(NamedTuple):
    """A box: its span in the text (`start`, `end`) and its content."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""Every \boxed{…} or \fbox{…} (braces balanced) that is closed and not empty, and \boxed followed by a word.

    Boxes with more than `LONGEST` characters are left out.
    """
    closing = closing_braces(text) if "\\" in text else {}
    found = []
    for box in _BOX.finditer(text):
        if box[1] is not None:
            found.append(Box(box.start(), box.end(), box[1]))
        elif (end := closing.get(box.end() - 1)) is not None and end - box.end() <= LONGEST:
            content = text[box.end() : end].strip()
            found += [Box(box.start(), end + 1, content)] if content else []
    return found


def closing_braces(text: str) -> dict[int, int]:
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


# What may stand between boxes of one list: a connecting word or mark, spacing, delimiters of formulas, a name ("x =").
_WORD = r"\\(?:text[a-z]{0,6}+|mathrm|mathbf|mbox|rm)\s*+\{[\s~]*+"
_CONNECTING = (
    r"(?:and(?: also)?+|or(?: else)?+|as well as|along with|together with|also|und|sowie|oder|et|ou)(?![A-Za-z])"
)
_PART = re.compile(
    rf"(?P<connects>{_WORD}(?:,[\s~]*+)?+(?:{_CONNECTING}|,)?+[\s~]*+\}}|{_CONNECTING}|y(?=\s*+[$\\])"
    r"|\\(?:land|lor|wedge|vee|&)(?![A-Za-z])|[,;，；、&和或])"
    r"|(?P<spacing>\\(?:q?quad|enspace|thinspace|space|hfill)(?![A-Za-z])|\\[hv]space\*?+\{[^{}]*+\}|\\[,;:! \\]|~)"
    r"|(?P<item>[^\S\n]*+\n\s*+(?:[-*•]|\d{1,2}[.)])[^\S\n]++)"
    r"|(?P<display>\$\$|\\[\[\]])|(?P<inline>\$|\\[()]|[()])|(?P<line>[^\S\n]*+\n\s*+)|\s++|(?P<stop>\.)"
    r"|(?P<name>\\?[A-Za-z]{1,9}(?:_\{?\w{1,9}\}?)?+(?:\(\w{1,9}\))?+\s*+&?+\s*+=)|(?P<begins>\\(?:begin|end)\{[a-z]++\*?+\})"
)


def last_box(text: str) -> tuple[int, str] | None:
    """(start, content) of the last box; None if there is none.

    Boxes that "and", "or", a comma or only spacing connect to it are included, separated by commas. Boxes in formulas
    of their own with nothing between them are one list, and so are boxes on one line, in the rows of a formula, and
    in the items of a list; a box that spacing connects to its copy counts once. A box after "not" or "rather than" does
    not count if there is another before it.
    """
    found = boxes(text)
    if not found:
        return None
    while len(found) > 1 and _DENIED.search(text, max(0, found[-1].start - _NEAR), found[-1].start):
        found.pop()
    start, _, last = found[-1]
    joined = [last]
    for before in reversed(found[:-1]):
        if before.end > start or start - before.end > _JOIN:
            break
        connection = _connection(text, before.end, start)
        if connection is None:
            break
        start = before.start
        if connection == "mark" or "".join(before.content.split()) != "".join(joined[-1].split()):
            joined.append(before.content)
    return start, ", ".join(reversed(joined))


_DENIED = re.compile(r"\b(?:not|rather than|instead of)\s?(?:\$\$?|\\[(\[])?\s?$")
_NEAR = 20  # characters before a box that may deny it
_JOIN = 60  # maximum characters between boxes that belong together


def _connection(text: str, start: int, end: int) -> str | None:
    """How the text between two boxes connects them: "mark" (a word or a comma), "space"; None if it does not."""
    kinds: list[str | None] = []
    while start < end:
        part = _PART.match(text, start, end)
        if part is None:
            return None
        kinds.append(part.lastgroup)
        start = part.end()
    if "connects" in kinds:
        return "mark"
    if "stop" in kinds or ("line" in kinds and not {"spacing", "display", "item"} & set(kinds)):
        return None
    return "space"
