"""Count the steps that a backtracking matcher takes, to test how the work of a pattern grows with its text.

A step is one attempt to match one node of the pattern at one place. The matcher follows `re` for the constructs that
the readers use.
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
def _parsed(pattern: str, flags: int) -> list[Node]:
    return _nodes(parser.parse(pattern, flags))


def _nodes(tree: Any) -> list[Node]:
    """The nodes of a parsed pattern as plain lists. One that matches a character remembers which ones it matches."""
    return [(operation, _operand(operation, value)) for operation, value in tree]


def _operand(operation: Any, value: Any) -> Any:
    if operation in _SINGLE:
        return value, dict[tuple[str, int], bool]()
    if operation is c.BRANCH:
        return [_nodes(branch) for branch in value[1]]
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


class Counter:
    """Steps of a pattern on a text: `Counter(pattern, text, limit).search_all()`."""

    def __init__(self, pattern: re.Pattern[str], text: str, limit: int) -> None:
        self.tree = _parsed(pattern.pattern, pattern.flags)
        self.flags, self.text, self.limit, self.steps = pattern.flags, text, limit, 0

    def match(self) -> int:
        """The steps of one attempt at the beginning of the text."""
        self._sequence(self.tree, 0, 0, self.flags, lambda at: at)
        return self.steps

    def search_all(self) -> int:
        place = 0
        while place <= len(self.text):
            end = self._sequence(self.tree, 0, place, self.flags, lambda at: at)
            place = place + 1 if end is None or end == place else end
        return self.steps

    def _sequence(self, nodes: Sequence[Node], index: int, place: int, flags: int, after: Next) -> int | None:
        while index < len(nodes):
            self.steps += 1
            if self.steps > self.limit:
                raise TooManyStepsError
            operation, value = nodes[index]
            index += 1
            if operation in _SINGLE:
                if not self._one(operation, value, place, flags):
                    return None
                place += 1
            elif operation is c.AT:
                if not self._at(value, place):
                    return None
            else:
                return self._compound(operation, value, place, flags, self._rest(nodes, index, flags, after))
        return after(place)

    def _rest(self, nodes: Sequence[Node], index: int, flags: int, after: Next) -> Next:
        return lambda at: self._sequence(nodes, index, at, flags, after)

    def _compound(self, operation: Any, value: Any, place: int, flags: int, rest: Next) -> int | None:
        if operation is c.BRANCH:
            for branch in value:
                if (end := self._sequence(branch, 0, place, flags, rest)) is not None:
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
        simple = len(nodes) == 1 and nodes[0][0] in _SINGLE
        if operation is c.POSSESSIVE_REPEAT or (simple and operation is c.MAX_REPEAT):
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

    def _one(self, operation: Any, value: Any, place: int, flags: int) -> bool:
        if place >= len(self.text):
            return False
        operand, known = value
        key = self.text[place], flags
        if key not in known:
            known[key] = self._is_one(operation, operand, *key)
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

    def _at(self, value: Any, place: int) -> bool:
        text = self.text
        if value in (c.AT_BEGINNING, c.AT_BEGINNING_STRING, c.AT_BEGINNING_LINE):
            multiline = self.flags & re.MULTILINE and value is not c.AT_BEGINNING_STRING
            return place == 0 or bool(multiline and text[place - 1] == "\n")
        if value in (c.AT_END, c.AT_END_LINE, c.AT_END_STRING):
            return place == len(text) or (
                text[place] == "\n" and bool(self.flags & re.MULTILINE or place == len(text) - 1)
            )
        sides = [0 <= side < len(text) and (text[side].isalnum() or text[side] == "_") for side in (place - 1, place)]
        return (sides[0] != sides[1]) == (value is c.AT_BOUNDARY)


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    c.CATEGORY_DIGIT: str.isdecimal,
    c.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    c.CATEGORY_SPACE: str.isspace,
    c.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    c.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    c.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}
