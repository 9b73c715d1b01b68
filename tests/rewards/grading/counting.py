"""Count the steps that a backtracking matcher takes, to test how the work of a pattern grows with its text.

A step is one attempt to match one node of the pattern at one place. The matcher follows `re` for the constructs that
the readers use. Most attempts fail because of the letters before and after the place, always after the same number of
steps. These are counted once for each pair of letters (`_failure`), not at each place.
"""

from __future__ import annotations

import re
import re._constants as c  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

Next = Callable[[int], int | None]


class TooManyStepsError(Exception):
    """The limit of steps is passed."""


_SINGLE = frozenset({c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN})
_REPEATS = frozenset({c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT})
Node = tuple[Any, Any]


@cache
def _parsed(pattern: str, flags: int) -> tuple[list[Node], dict[tuple[str, str], int | None]]:
    """The nodes of a pattern, and the steps of its failures by the letters around the place."""
    return _nodes(parser.parse(pattern, flags)), {}


def _nodes(tree: Any) -> list[Node]:
    """The nodes of a parsed pattern as plain lists. One that matches a character remembers which ones it matches."""
    return [(operation, _operand(operation, value)) for operation, value in tree]


def _operand(operation: Any, value: Any) -> Any:
    if operation in _SINGLE:
        return value, dict[tuple[str, int], bool]()
    if operation is c.BRANCH:
        return [_nodes(branch) for branch in value[1]], dict[tuple[str, str, int], list[Any]]()
    if operation is c.SUBPATTERN:
        return value[1], value[2], _nodes(value[3])
    if operation in (c.ASSERT, c.ASSERT_NOT):
        direction, inner = value
        return 0 if direction > 0 else inner.getwidth()[0], _nodes(inner)
    if operation is c.ATOMIC_GROUP:
        return _nodes(value)
    if operation in _REPEATS:
        return value[0], value[1], _nodes(value[2])
    return value


def _in_a_loop(operation: Any, nodes: Sequence[Node]) -> bool:
    """Whether a repeat is tried in a loop, which counts each try."""
    simple = len(nodes) == 1 and nodes[0][0] in _SINGLE
    return operation is c.POSSESSIVE_REPEAT or (simple and operation is c.MAX_REPEAT)


def _sum(*steps: int | None) -> int | None:
    """None if any of them is."""
    return None if None in steps else sum(one for one in steps if one)


class Counter:
    """Steps of a pattern on a text: `Counter(pattern, text, limit).search_all()`."""

    def __init__(self, pattern: re.Pattern[str], text: str, limit: int) -> None:
        self.tree, self.failures = _parsed(pattern.pattern, pattern.flags)
        self.flags, self.text, self.limit, self.steps = pattern.flags, text, limit, 0

    def match(self) -> int:
        """The steps of one attempt at the beginning of the text."""
        self._sequence(self.tree, 0, 0, self.flags, lambda at: at)
        return self.steps

    def search_all(self) -> int:
        place = 0
        while place <= len(self.text):
            around = self._around(place)
            if around not in self.failures:
                self.failures[around] = self._failure(self.tree, *around, self.flags)
            end, steps = None, self.failures[around]
            if steps is None:
                end = self._sequence(self.tree, 0, place, self.flags, lambda at: at)
            else:
                self._take(steps)
            place = place + 1 if end is None or end == place else end
        return self.steps

    def _around(self, place: int) -> tuple[str, str]:
        """The letters before and after a place, "" where the text begins or ends."""
        return self.text[max(0, place - 1) : place], self.text[place : place + 1]

    def _take(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.limit:
            raise TooManyStepsError

    def _sequence(self, nodes: Sequence[Node], index: int, place: int, flags: int, after: Next) -> int | None:
        while index < len(nodes):
            self.steps += 1
            if self.steps > self.limit:
                raise TooManyStepsError
            operation, value = nodes[index]
            index += 1
            if operation in _SINGLE:
                if not self._one(operation, value, self.text[place : place + 1], flags):
                    return None
                place += 1
            elif operation is c.AT:
                holds = self._at(value, *self._around(place))
                if not (place == len(self.text) - 1 if holds is None else holds):
                    return None
            else:
                return self._compound(operation, value, place, flags, self._rest(nodes, index, flags, after))
        return after(place)

    def _rest(self, nodes: Sequence[Node], index: int, flags: int, after: Next) -> Next:
        return lambda at: self._sequence(nodes, index, at, flags, after)

    def _compound(self, operation: Any, value: Any, place: int, flags: int, rest: Next) -> int | None:
        if operation is c.BRANCH:
            branches, known = value
            key = *self._around(place), flags
            if key not in known:
                known[key] = self._open(branches, *key)
            for failed, branch in known[key]:
                self._take(failed)
                if branch is not None and (end := self._sequence(branch, 0, place, flags, rest)) is not None:
                    return end
            return None
        if operation is c.SUBPATTERN:
            on, off, inner = value
            return self._sequence(inner, 0, place, (flags | on) & ~off, rest)
        if operation in (c.ASSERT, c.ASSERT_NOT):
            width, inner = value
            start = place - width
            found = start >= 0 and self._sequence(inner, 0, start, flags, lambda at: at) is not None
            return rest(place) if found == (operation is c.ASSERT) else None
        if operation is c.ATOMIC_GROUP:
            end = self._sequence(value, 0, place, flags, lambda at: at)
            return None if end is None else rest(end)
        return self._repeat(operation, value, place, flags, rest)

    def _repeat(self, operation: Any, value: Any, place: int, flags: int, rest: Next) -> int | None:
        low, high, nodes = value
        ends, at = [place], place
        if _in_a_loop(operation, nodes):
            while high is c.MAXREPEAT or len(ends) <= high:
                self.steps += 1
                end = self._sequence(nodes, 0, at, flags, lambda end: end)
                if end is None or end == at:
                    break
                ends.append(at := end)
            if len(ends) <= low:
                return None
            for end in reversed(ends[low:]) if operation is c.MAX_REPEAT else ends[-1:]:
                self.steps += 1
                if self.steps > self.limit:
                    raise TooManyStepsError
                if (found := rest(end)) is not None:
                    return found
            return None

        def again(count: int, at: int) -> int | None:
            more = high is c.MAXREPEAT or count < high
            step: Next = lambda end: None if end == at else again(count + 1, end)  # noqa: E731
            if operation is c.MIN_REPEAT:
                end = rest(at) if count >= low else None
                return end if end is not None or not more else self._sequence(nodes, 0, at, flags, step)
            end = self._sequence(nodes, 0, at, flags, step) if more else None
            return rest(at) if end is None and count >= low else end

        return again(0, place)

    def _open(
        self, branches: list[list[Node]], before: str, letter: str, flags: int
    ) -> list[tuple[int, list[Node] | None]]:
        """The branches that these letters leave open, each after the steps of those that fail before it, and None after
        the steps of the last ones that fail."""
        found, failed = list[tuple[int, list[Node] | None]](), 0
        for branch in branches:
            steps = self._failure(branch, before, letter, flags)
            failed += steps or 0
            if steps is None:
                found.append((failed, branch))
                failed = 0
        return [*found, (failed, None)]

    def _failure(self, nodes: Sequence[Node], before: str, letter: str, flags: int) -> int | None:
        """The steps until these nodes fail between two letters, whatever else the text has. None if they match, or if
        more than the two letters decides."""
        if not nodes:
            return None
        (operation, value), rest = nodes[0], nodes[1:]

        def of(inner: Sequence[Node], changed: int = flags) -> int | None:
            return self._failure(inner, before, letter, changed)

        if operation in _SINGLE:
            return None if self._one(operation, value, letter, flags) else 1
        if operation is c.AT:
            holds = self._at(value, before, letter)
            return None if holds is None else _sum(1, of(rest)) if holds else 1
        if operation is c.BRANCH:
            return _sum(1, *map(of, value[0]))
        if operation is c.SUBPATTERN:
            on, off, inner = value
            return _sum(1, of(inner, (flags | on) & ~off))
        if operation is c.ATOMIC_GROUP:
            return _sum(1, of(value))
        if operation in (c.ASSERT, c.ASSERT_NOT):
            width, inner = value
            if width == 0:
                steps = _sum(1, of(inner))
                return steps if operation is c.ASSERT else _sum(steps, of(rest))
            if width == len(inner) == 1 and inner[0][0] in _SINGLE:
                holds = self._one(*inner[0], before, flags) == (operation is c.ASSERT)
                return _sum(1, len(before), of(rest) if holds else 0)
        if operation in _REPEATS and value[1]:
            low, _, inner = value
            tried = 1 if _in_a_loop(operation, inner) else 0
            steps = _sum(1, tried, of(inner))
            return steps if low else _sum(steps, tried, of(rest))
        return None

    def _one(self, operation: Any, value: Any, letter: str, flags: int) -> bool:
        if not letter:
            return False
        operand, known = value
        key = letter, flags
        if key not in known:
            known[key] = self._is_one(operation, operand, letter, flags)
        return known[key]

    def _is_one(self, operation: Any, operand: Any, letter: str, flags: int) -> bool:
        if operation is c.ANY:
            return letter != "\n" or bool(flags & re.DOTALL)
        if operation is c.IN:
            negated = operand[0][0] is c.NEGATE
            return any(self._member(kind, item, letter, flags) for kind, item in operand[negated:]) != negated
        same = self._same(operand, letter, flags)
        return same == (operation is c.LITERAL)

    def _same(self, code: int, letter: str, flags: int) -> bool:
        return chr(code) == letter or (bool(flags & re.IGNORECASE) and chr(code).lower() == letter.lower())

    def _member(self, kind: Any, item: Any, letter: str, flags: int) -> bool:
        if kind is c.LITERAL:
            return self._same(item, letter, flags)
        if kind is c.RANGE:
            letters = {letter, letter.lower(), letter.upper()} if flags & re.IGNORECASE else {letter}
            return any(item[0] <= ord(one) <= item[1] for one in letters if len(one) == 1)
        return bool(_CATEGORIES[item](letter))

    def _at(self, value: Any, before: str, letter: str) -> bool | None:
        """Whether a condition on a place holds; None if it does before the last letter only."""
        if value in (c.AT_BEGINNING, c.AT_BEGINNING_STRING, c.AT_BEGINNING_LINE):
            multiline = self.flags & re.MULTILINE and value is not c.AT_BEGINNING_STRING
            return not before or bool(multiline and before == "\n")
        if value in (c.AT_END, c.AT_END_LINE, c.AT_END_STRING):
            return not letter or (letter == "\n" and (True if self.flags & re.MULTILINE else None))
        sides = [side.isalnum() or side == "_" for side in (before, letter)]
        return (sides[0] != sides[1]) == (value is c.AT_BOUNDARY)


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    c.CATEGORY_DIGIT: str.isdecimal,
    c.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    c.CATEGORY_SPACE: str.isspace,
    c.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    c.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    c.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}
