"""Sets of real numbers as sorted ranges: intervals, unions, differences, solutions of inequalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from gruppo.rewards.grading.evaluate import DIGITS, NoValueError, TooLargeError, Value, context, real_number, value

ENDS = 60  # ends of ranges in one set


class End(NamedTuple):
    """An end of a range. `place`: a value, or -1 or 1 times infinity; `side`: -1 just below, 0 at, 1 just above."""

    infinite: int
    place: Value
    side: int


class Ranges:
    """A set of real numbers. Two are equal if they have the same ranges; ends are compared by value."""

    def __init__(self, parts: Sequence[tuple[End, End]]) -> None:
        self.parts = _merged(parts)

    def same(self, other: Ranges) -> bool:
        return len(self.parts) == len(other.parts) and all(
            _order(one, two) == 0 for mine, its in zip(self.parts, other.parts, strict=True)
            for one, two in zip(mine, its, strict=True)
        )  # fmt: skip

    def joined(self, other: Ranges) -> Ranges:
        return Ranges([*self.parts, *other.parts])

    def outside(self) -> Ranges:
        """The real numbers that are not in the set."""
        begin, parts = _LOWEST, []
        for first, last in self.parts:
            if _order(begin, first) < 0:
                parts.append((begin, first))
            begin = last
        return Ranges([*parts, (begin, _HIGHEST)] if _order(begin, _HIGHEST) < 0 else parts)

    def common(self, other: Ranges) -> Ranges:
        return self.outside().joined(other.outside()).outside()


# A range covers the numbers between two cuts; a cut lies just below (-1) or just above (1) its place.
_LOWEST, _HIGHEST = End(-1, Fraction(0), 0), End(1, Fraction(0), 0)


def _order(first: End, second: End) -> int:
    if first.infinite or second.infinite:
        return (first.infinite > second.infinite) - (first.infinite < second.infinite)
    mp = context(DIGITS)
    if isinstance(first.place, Fraction) and isinstance(second.place, Fraction):
        difference = first.place - second.place
        same = difference == 0
    else:
        one, two = real_number(mp, first.place), real_number(mp, second.place)
        difference = mp.re(one - two)
        same = abs(difference) <= mp.mpf(10) ** -40 * (abs(one) + abs(two))
    if same:
        return (first.side > second.side) - (first.side < second.side)
    return 1 if difference > 0 else -1


def _order_of_first(one: tuple[End, End], two: tuple[End, End]) -> int:
    return _order(one[0], two[0])


def _merged(parts: Sequence[tuple[End, End]]) -> list[tuple[End, End]]:
    from functools import cmp_to_key

    if len(parts) > ENDS:
        raise TooLargeError
    merged: list[tuple[End, End]] = []
    for first, last in sorted(parts, key=cmp_to_key(_order_of_first)):
        if _order(first, last) >= 0:
            continue
        if merged and _order(first, merged[-1][1]) <= 0:
            if _order(merged[-1][1], last) < 0:
                merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _number(item: Any) -> tuple[int, Value]:
    name = type(item).__name__
    if name in ("Infinity", "NegativeInfinity") or str(item) in ("oo", "-oo"):
        return (-1 if "-" in str(item) else 1), Fraction(0)
    found = value(item)
    if abs(getattr(found, "imag", 0)) > 0:
        raise NoValueError
    return 0, found


def _between(first: Any, last: Any, first_open: bool, last_open: bool) -> Ranges:
    low, high = _number(first), _number(last)
    return Ranges([(End(*low, 1 if first_open else -1), End(*high, -1 if last_open else 1))])


def ranges_of_set(item: Any) -> Ranges:
    """The ranges of a sympy set. Raises `NoValueError` for sets that are not made of intervals and points."""
    name = type(item).__name__
    if name == "Interval":
        return _between(item.start, item.end, bool(item.left_open), bool(item.right_open))
    if name == "FiniteSet":
        found = Ranges([])
        for part in item.args:
            found = found.joined(_between(part, part, False, False))
        return found
    if name == "EmptySet":
        return Ranges([])
    if name in ("Reals", "UniversalSet"):
        return Ranges([(_LOWEST, _HIGHEST)])
    if name in ("Union", "Intersection", "Complement"):
        parts = [ranges_of_set(part) for part in item.args]
        found = parts[0]
        for other in parts[1:]:
            if name == "Union":
                found = found.joined(other)
            else:
                found = found.common(other if name == "Intersection" else other.outside())
        return found
    raise NoValueError(name)


def range_of_relation(item: Any, name: str, root_of: Callable[[Callable[[Any], Value]], Value | None]) -> Ranges:
    """The numbers that satisfy relations which are linear in their only unknown, or which compare the absolute value of
    such a term with a number. Raises `NoValueError` for others.
    """
    kind = type(item).__name__
    if kind in ("And", "Or"):
        parts = [range_of_relation(part, name, root_of) for part in item.args]
        found = parts[0]
        for other in parts[1:]:
            found = found.common(other) if kind == "And" else found.joined(other)
        return found

    if sides := _absolute(item):
        return _range_of_absolute(item, *sides, partial(range_of_relation, name=name, root_of=root_of))

    def difference(at: Value) -> Value:
        return _minus(value(item.lhs, {name: at}), value(item.rhs, {name: at}))

    infinite = [side for side in (item.lhs, item.rhs) if str(side) in ("oo", "-oo")]
    if infinite:
        return Ranges([(_LOWEST, _HIGHEST)])
    root = root_of(difference)
    if root is None:
        raise NoValueError
    rises = _positive(difference(root + 1))
    below, above = End(0, root, -1), End(0, root, 1)
    if kind == "Equality":
        return Ranges([(below, above)])
    if kind == "Unequality":
        return Ranges([(below, above)]).outside()
    greater = (kind in ("StrictGreaterThan", "GreaterThan")) == rises
    closed = kind in ("GreaterThan", "LessThan")
    if greater:
        return Ranges([(below if closed else above, _HIGHEST)])
    return Ranges([(_LOWEST, above if closed else below)])


def _absolute(item: Any) -> tuple[Any, Any] | None:
    """The term whose absolute value is one side of a relation, and the other side if it is a number; else None."""
    for side, other in ((item.lhs, item.rhs), (item.rhs, item.lhs)):
        if type(side).__name__ == "Abs" and not other.free_symbols:
            return side.args[0], other
    return None


def _range_of_absolute(item: Any, term: Any, size: Any, range_of: Callable[[Any], Ranges]) -> Ranges:
    from sympy import Eq, Ge, Gt, Le, Lt, Mul

    kind, least = type(item).__name__, Mul(-1, size, evaluate=False)
    if kind in ("Equality", "Unequality"):
        both = (
            [range_of(Eq(term, end, evaluate=False)) for end in (size, least)] if value(size) >= 0 else [Ranges([])] * 2
        )
        ends = both[0].joined(both[1])
        return ends if kind == "Equality" else ends.outside()
    above, below = (Ge, Le) if kind in ("GreaterThan", "LessThan") else (Gt, Lt)
    if kind.endswith("GreaterThan") == (type(item.lhs).__name__ == "Abs"):
        return range_of(above(term, size, evaluate=False)).joined(range_of(below(term, least, evaluate=False)))
    return range_of(below(term, size, evaluate=False)).common(range_of(above(term, least, evaluate=False)))


def _minus(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first - second
    mp = context(DIGITS)
    return real_number(mp, first) - real_number(mp, second)


def _positive(number: Value) -> bool:
    return bool(number.real > 0) if not isinstance(number, Fraction) else number > 0
