r"""Conditions on a real number as sets: "x<1 or x>3", \{x \in \mathbb{R} : |x| > 2\}, x \in (0,1) \cup (2,3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from gruppo.rewards.grading.evaluate import NoValueError, TooLargeError
from gruppo.rewards.grading.latex import WORD, split
from gruppo.rewards.grading.ranges import Ranges
from gruppo.rewards.grading.symbolic import unknown_and_ranges

# A relation whose sides are ordered or different; an equation is not one.
RELATION = re.compile(r"[<>]|\\(?:l|g)(?:eq?|t|eqslant|eqq)(?![A-Za-z])|\\neq?(?![A-Za-z])")
_SIDES = re.compile(rf"{WORD}\s*+\{{\s*+,?\s*+(and|or)\s*+\}}|(?<![A-Za-z\\])(and|or)(?![A-Za-z])")
_ANY, _ALL = re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), re.compile(r"\\(?:land|wedge)(?![A-Za-z])")
_BUILDER = re.compile(
    r"\\\{\s*+[A-Za-z]\s*+(?:\\in\s*+\\mathbb\s*+\{?R\}?\s*+)?(?:\\mid\b|\||:|\\colon\b|\\vert\b)(.*)\\\}", re.DOTALL
)
_REAL = r"[A-Za-z]\s*+\\in\s*+(?:\\mathbb\s*+\{?R\}?|\(\s*+-\s*+\\infty\s*+,\s*+\\infty\s*+\))"
_DOMAIN = re.compile(
    rf"^\s*+{_REAL}\s*+,|(?:,|\\forall|{WORD}\s*+\{{\s*+,?\s*+(?:for (?:all|every|each)|where|with)(?: real)?\s*+\}})"
    rf"\s*+(?:\\forall\s*+)?{_REAL}\s*+$"
)
_MEMBER = re.compile(r"\s*([A-Za-z])\s*\\in(?![A-Za-z])(.*)", re.DOTALL)


def with_marks(text: str) -> str:
    r"""A formula with relations, with "and" and "or" between them as \land and \lor; any other formula unchanged."""
    if not RELATION.search(text):
        return text
    return _SIDES.sub(lambda side: r"\land " if "and" in side.group(1, 2) else r"\lor ", text)


def without_marks(text: str) -> str:
    r"""A formula with commas for \land and \lor."""
    return _ALL.sub(",", _ANY.sub(",", text))


def without_domain(text: str) -> str:
    r"""A formula without the remark that its unknown is any real number: ", x \in \mathbb{R}"."""
    return _DOMAIN.sub("", text).strip()


def condition(text: str) -> str:
    r"""The condition of a set such as \{x \mid x > 3\}; any other formula unchanged."""
    match = _BUILDER.fullmatch(text.strip())
    return match[1].strip() if match else text


def members(text: str) -> str:
    r"""The finite set of a formula such as x \in \{1, 2\}; any other formula unchanged."""
    match = _MEMBER.fullmatch(text)
    return match[2].strip() if match and match[2].lstrip().startswith("\\{") else text


def same_condition(answer: str, wanted: str, parse: Callable[[str], Sequence[Any]]) -> bool | None:
    """Whether two conditions hold for the same numbers; None if neither has a relation, or one cannot be read.

    A comma means "and", or "or" if no number satisfies both. `parse` reads one relation or set.
    """
    if not (RELATION.search(answer) or RELATION.search(wanted)):
        return None
    try:
        names: set[str] = set()
        first, second = (_ranges(text, parse, names) for text in (answer, wanted))
    except (NoValueError, TooLargeError, RecursionError):
        return None
    return len(names) < 2 and first.same(second)


def _ranges(text: str, parse: Callable[[str], Sequence[Any]], names: set[str]) -> Ranges:
    """The numbers that satisfy a condition. `names`: receives the unknown."""
    if member := _MEMBER.fullmatch(text):
        names.add(member[1].lower())
        return _ranges(member[2], parse, names)
    for mark in (_ANY, _ALL, re.compile(",")):
        parts = split(mark.sub("\0", text), "\0")
        if len(parts) > 1:
            found = [_ranges(part, parse, names) for part in parts]
            return _combined(found, mark)
    read = parse(text)
    if not read:
        raise NoValueError
    name, ranges = unknown_and_ranges(read[0])
    names.update([name] if name else [])
    return ranges


def _combined(found: Sequence[Ranges], mark: re.Pattern[str]) -> Ranges:
    every = any_one = found[0]
    for other in found[1:]:
        every, any_one = every.common(other), any_one.joined(other)
    return any_one if mark is _ANY or (mark is not _ALL and not every.parts) else every
