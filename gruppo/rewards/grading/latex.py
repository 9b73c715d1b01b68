"""LaTeX in a text: its formulas, and the arguments of commands. Every function takes one pass over the text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from gruppo.data.boxes import closing_braces


class Formula(NamedTuple):
    """A formula with its delimiters: its span in the text, and its text."""

    start: int
    end: int
    text: str


# A command that sets its argument upright, mostly words.
WORD = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|operatorname|rm)"

_DELIMITER = re.compile(r"\\[\s\S]|\$\$?")
_CLOSING = {"\\(": "\\)", "\\[": "\\]"}


def formulas(text: str) -> list[Formula]:
    r"""Every formula between $…$, $$…$$, \(…\) or \[…\] that is closed and not empty."""
    marks = [(found.start(), found[0]) for found in _DELIMITER.finditer(text)]
    marks = [(place, mark) for place, mark in marks if mark in ("$", "$$", "\\(", "\\)", "\\[", "\\]")]
    ends = {closing: [place for place, mark in marks if mark == closing] for closing in _CLOSING.values()}
    dollars = [(place, mark) for place, mark in marks if mark[0] == "$"]
    found: list[Formula] = []
    end = 0
    for place, mark in marks:
        if place < end or mark in ends:
            continue
        begin = place + len(mark)
        if mark in _CLOSING:
            closings = ends[_CLOSING[mark]]
            after = bisect_left(closings, begin + 1)
            stop = closings[after] + 2 if after < len(closings) else 0
        else:
            after = bisect_left(dollars, (begin + 1, ""))
            stop = dollars[after][0] + len(dollars[after][1]) if after < len(dollars) else 0
        if stop:
            found.append(Formula(place, stop, text[place:stop]))
            end = stop
    return found


_COMMAND = re.compile(
    r"\\(?:([dtc]?frac|[dt]?binom)|sqrt)(?![A-Za-z])|\^(?=\s?\\(?:[dtc]?frac|[dt]?binom|sqrt)(?![A-Za-z]))"
)
_TOKEN = re.compile(r"\s*+(?:\\(?:[dtc]?frac|[dt]?binom|sqrt)(?![A-Za-z])|\\[A-Za-z]++|[A-Za-z0-9{])")
_WITH_GROUP = re.compile(r"\\(?:text|math|over|under|hat|bar|vec)[a-z]*+")
_INDEX = re.compile(r"\s*+\[[^\[\]{}]{0,20}\]")
_DEEPEST = 20  # commands as arguments of commands


def braced(text: str) -> str:
    r"""The text with braces around the arguments of \frac and \binom, as TeX reads them, and around a command that is
    the argument of \sqrt or an exponent: \frac\pi4 becomes \frac{\pi}{4}. {n \choose k} becomes {\binom{n}{k}}.
    """
    if "\\" not in text:
        return text
    text = _with_binomials(text)
    closing = closing_braces(text)
    marks: list[tuple[int, str]] = []
    for command in _COMMAND.finditer(text):
        place = command.end()
        for argument in _arguments(text, command, closing, 0):
            bare = text[argument[0]]
            if bare != "{" and (command[1] or bare == "\\"):
                marks += [(argument[0], "{"), (argument[1], "}")]
            place = argument[1]
    if not marks:
        return text
    marks.sort(key=lambda mark: (mark[0], mark[1] == "{"))
    parts, before = [], 0
    for place, brace in marks:
        parts += [text[before:place], brace]
        before = place
    return "".join([*parts, text[before:]])


_CHOOSE = re.compile(r"\\choose(?![A-Za-z])")
_CHOICES = 20  # binomial coefficients that are rewritten


def _with_binomials(text: str) -> str:
    """A text with \\binom for \\choose, which divides the braces around it, or a whole text without a list."""
    places = [found.span() for found in _CHOOSE.finditer(text)]
    if not 0 < len(places) <= _CHOICES:
        return text
    pairs = closing_braces(text)
    edits: dict[int, tuple[int, str]] = {}  # place: characters that are replaced, and what replaces them
    for start, end in places:
        begin = max((opened for opened, closed in pairs.items() if opened < start < closed), default=-1)
        if begin in edits or (begin < 0 and re.search("[,;=$]", text)):
            return text
        stop = pairs[begin] if begin >= 0 else len(text)
        factor = begin < 0 or text[:begin].rstrip()[-1:] in tuple("0123456789+-(")  # 3{n \\choose k}
        opening, closing = ("\\binom{", "}") if factor else ("{\\binom{", "}}")
        edits |= {begin: (1, opening), start: (end - start, "}{"), stop: (1, closing)}
    parts, place = [], -1
    for at, (size, other) in sorted(edits.items()):
        parts += [text[max(place, 0) : max(at, 0)], other]
        place = at + size
    return "".join([*parts, text[place:]])


def _arguments(text: str, command: re.Match[str], closing: dict[int, int], depth: int) -> Sequence[tuple[int, int]]:
    """Spans of the arguments of a command; [] if one is missing."""
    spans: list[tuple[int, int]] = []
    place = command.end()
    if not command[1] and (index := _INDEX.match(text, place)):
        place = index.end()
    for _ in range(2 if command[1] else 1):
        token = _TOKEN.match(text, place)
        if token is None or depth > _DEEPEST:
            return []
        begin = token.end() - len(token[0].lstrip())
        if text[begin] == "{":
            if begin not in closing:
                return []
            place = closing[begin] + 1
        elif inner := _COMMAND.fullmatch(text, begin, token.end()):
            inside = _arguments(text, inner, closing, depth + 1)
            if not inside:
                return []
            place = inside[-1][1]
        else:
            place = token.end()
            if _WITH_GROUP.fullmatch(text, begin, place) and place in closing:
                place = closing[place] + 1
        spans.append((begin, place))
    return spans


_END_MARK = re.compile(
    r"(?:(?:\$|\\\()\s*+(?:\\(?:hfill|q?quad)\s*+)?\\(?:(?:black)?square|Box|qed(?:symbol)?)\s*+(?:\$|\\\))"
    r"|\\qed(?:symbol)?|[□■∎]|\bQ\.?E\.?D)\.?$"
)
_LONGEST_MARK = 40


def without_end_mark(text: str) -> str:
    r"""A text without the mark of the end of a proof ("$\blacksquare$"); unchanged if nothing else is in it."""
    text = text.rstrip()
    found = _END_MARK.search(text, max(0, len(text) - _LONGEST_MARK))
    return (text[: found.start()].rstrip() or text) if found else text


def split(text: str, marks: str) -> list[str]:
    """Parts of a formula between separators (`marks`) that are not inside brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter in marks and depth <= 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def ratio_as_tuple(text: str) -> str:
    r"""A ratio of three to ten parts, maybe after "a:b:c =", as a tuple that equal ratios share.

    1:2:3 and 2:4:6 are both (ratio, 1, 2, 3), with fractions: math-verify reads 1:2:3 as 1/2/3. Anything else is
    unchanged.
    """
    if text.count(":") < 2:
        return text
    name, _, right = text.rpartition("=")
    parts = split(right if _NAMES.fullmatch(name) else text, ":")
    if not 3 <= len(parts) <= 10 or not all(map(_PART.fullmatch, parts)):
        return text
    zeros = next((place for place, part in enumerate(parts) if part.strip("0.")), len(parts) - 1)
    shares = [f"\\frac{{{part}}}{{{parts[zeros]}}}" for part in parts[zeros + 1 :]]
    return f"(\\text{{ratio}},{','.join(['0'] * zeros + ['1', *shares])})"


_NAMES = re.compile(r"\s*+(?:\\?[A-Za-z]{1,10}(?:_\{?\w{1,9}\}?)?\s*+:?\s*+)*+")
_PART = re.compile(r"[^=<>,;:]*\w[^=<>,;:]*")


_FACTOR = re.compile(
    r"((?<![\w.^])\d++(?:\.\d++)?|\([^(),]{1,60}\))\s*+(?=(?:\\left\s?)?\([^(),]{1,60}\)|\\[dt]?binom(?![A-Za-z]))"
)


def with_products(text: str) -> str:
    r"""A formula with \cdot between a number and a bracket or \binom: math-verify reads 3(4) as 3 + 4."""
    return _FACTOR.sub(r"\1\\cdot ", text)
