"""Equality of two parsed answers: numbers, expressions, equations, inequalities, sets, tuples, matrices.

Expressions are equal if their values are equal: exactly for rational numbers, else in 360 digits, and in 40 digits at
several fixed points for expressions with symbols. The work is bounded by the size of the expressions (`evaluate`); what
is larger is equal only if it is written the same way. No clock takes part in a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from gruppo.rewards.grading.evaluate import DIGITS, NoValueError, TooLargeError, Value, context, real_number, value
from gruppo.rewards.grading.ranges import Ranges, range_of_relation, ranges_of_set
from gruppo.rewards.grading.rounding import decimals, rounds_to

SURE = 400  # digits in which numbers are computed that are equal in fewer, so that sqrt(10^40 + 1) is not 10^20
ITEMS = 200  # items of a set, tuple or matrix
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
_SIGNS = ("++++", "++++", "-+-+", "+--+", "++++", "--++", "+-+-", "----")
_NEEDED = 3  # points at which both expressions have a real value


def same_expression(wanted: Any, answer: Any) -> bool:
    """Whether an answer means the same as a reference, both parsed.

    A reference "x = 5" is the same as 5, and 5 as the answer "x = 5"; an inequality as its range; a set or tuple needs
    the same number of items.
    """
    try:
        return _same(wanted, answer)
    except (NoValueError, TooLargeError, RecursionError):
        return False


def _same(wanted: Any, answer: Any) -> bool:
    wanted, answer = _without_name(wanted, answer)
    if _kind(wanted) == _kind(answer) == "expression":
        return _same_value(wanted, answer)
    if wanted == answer:
        return True
    for kind, compare in _BY_KIND.items():
        if kind in (_kind(wanted), _kind(answer)):
            return compare(wanted, answer)
    return False


def _kind(item: Any) -> str:
    from sympy import Expr, MatrixBase, MatrixExpr, Set, Tuple
    from sympy.core.relational import Relational

    name = type(item).__name__
    if isinstance(item, MatrixBase) or name in ("MatAdd", "MatMul"):
        return "matrix"
    if isinstance(item, MatrixExpr):
        return "other"
    if isinstance(item, Relational) or (
        name in ("And", "Or") and item.args and set(map(_kind, item.args)) == _RELATION
    ):
        return "relation"
    if isinstance(item, Tuple):
        return "tuple"
    if isinstance(item, Set):
        return "set"
    return "expression" if isinstance(item, Expr) else "other"


_RELATION = {"relation"}


def _equations(item: Any) -> Sequence[Any]:
    """The equations of an item such as a = b = c; empty if it has others or none."""
    from sympy import Eq

    parts = getattr(item, "_unsorted_args", item.args) if type(item).__name__ == "And" else [item]
    return parts if all(isinstance(part, Eq) for part in parts) else ()


def _without_name(wanted: Any, answer: Any) -> tuple[Any, Any]:
    """Without "x =" on the side that has it, if the other side is no equation."""
    from sympy import Eq

    pair = [wanted, answer]
    equations = [_equations(item) for item in pair]
    for place, parts in enumerate(equations):
        if len(parts) > 1 and _is_name(parts[0].lhs):
            pair[place] = Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)
            equations[place] = [pair[place]]
    if equations[1] and not equations[0]:
        pair[1] = equations[1][-1].rhs
    elif equations[0] and not equations[1] and _is_name(equations[0][0].lhs):
        pair[0] = equations[0][-1].rhs
    return pair[0], pair[1]


def _is_name(item: Any) -> bool:
    """Whether the left side of an equation is a name: x, x_1, f(x), A/S."""
    if item.is_Symbol:
        return True
    if item.is_Pow and item.args[1] == -1:
        return _is_name(item.args[0])
    return bool(item.args) and all(map(_is_name, item.args))


def _same_value(wanted: Any, answer: Any) -> bool:
    if wanted == answer:
        return True
    if (joined := _joined(wanted, answer)) is not None:
        return joined
    try:
        if _equal_everywhere(wanted, answer):
            return True
    except TooLargeError:
        return False
    shares = [_percentage(item) for item in (wanted, answer)]
    if (shares[0] is None) != (shares[1] is None):
        return _same_value(
            *(item if share is None else share for item, share in zip((wanted, answer), shares, strict=True))
        )
    return False


def _percentage(item: Any) -> Any | None:
    """75 for 75 %; None for anything else."""
    if item.is_Mul and len(item.args) == 2:
        factors = [factor for factor in item.args if type(factor).__name__ != "UnevaluatedExpr"]
        if len(factors) == 1:
            return factors[0]
    return None


def _joined(wanted: Any, answer: Any) -> bool | None:
    """Words: a symbol of several letters against the product of its letters; None for anything else."""
    from sympy import E

    for one, other in ((wanted, answer), (answer, wanted)):
        if (
            one.is_Symbol
            and len(one.name) > 1
            and other.is_Mul
            and all(part.is_Symbol or part == E for part in other.args)
        ):
            letters = "".join("e" if part == E else part.name for part in other.args)
            return sorted(one.name.lower()) == sorted(letters.lower())
        if one.is_Symbol and one.name.lower() == "e" and other == E:
            return True
    return None


def _equal_everywhere(wanted: Any, answer: Any) -> bool:
    """Whether two expressions have the same value at every point where both have a real one."""
    names = sorted(_names(wanted) | _names(answer))
    if not names:
        return _equal_at(wanted, answer, {}) is True
    is_complex = "i" in {str(symbol) for symbol in wanted.free_symbols | answer.free_symbols}
    compared = 0
    for point in _points(names):
        same = _equal_at(wanted, answer, point, not is_complex)
        if same is False:
            return False
        compared += same is True
    return compared >= _NEEDED


def _names(item: Any) -> set[str]:
    """Free symbols and unknown functions of an expression, except the imaginary unit and bound symbols."""
    from sympy.core.function import AppliedUndef

    names = {str(symbol) for symbol in item.free_symbols}
    functions = {str(function) for function in item.atoms(AppliedUndef)}
    return (names | functions) - {"i"}


def _points(names: Sequence[str]) -> Iterator[dict[str, Fraction]]:
    """Fixed points: positive, negative and mixed, large and small, with unrelated coordinates."""
    count = len(_PRIMES)
    for row, signs in enumerate(_SIGNS):
        point = {}
        for place, name in enumerate(names):
            over, under = _PRIMES[(3 * place + 5 * row + 2) % count], _PRIMES[(7 * place + 11 * row + 6) % count]
            size = Fraction(over, under if over != under else 101) + place // count
            size = size if row < 4 or size < 1 else 1 / size
            point[name] = size if signs[place % 4] == "+" else -size
        yield point


def _equal_at(wanted: Any, answer: Any, point: Mapping[str, Fraction], real: bool = False) -> bool | None:
    """Whether two expressions are equal at a point; None if one of them has no value there (`real`: no real one)."""
    try:
        values = value(wanted, point), value(answer, point)
    except NoValueError:
        if point:
            return None
        raise
    if real and any(not _is_real(number) for number in values):
        return None
    rounded = not point and all(map(_is_real, values))
    if rounded and rounds_to(values[1], _decimals(answer), values[0], _decimals(wanted)):
        return True
    same = equal_values(*values)
    exact = all(isinstance(number, Fraction) for number in values)
    if same is False or exact or (same and point):
        return same
    digits = 2 * DIGITS if point else SURE
    first, second = (value(item, point, digits) for item in (wanted, answer))
    mp = context(digits)
    one, other = real_number(mp, first), real_number(mp, second)
    return bool(abs(one - other) < max(abs(one), abs(other), 1) * mp.mpf(10) ** (40 - digits))


def _decimals(item: Any) -> int | None:
    """The decimals of a decimal number, with or without a sign; None for anything else."""
    sign, *rest = item.args if item.is_Mul else (item,)
    if sign == -1 and len(rest) == 1:
        item = rest[0]
    return decimals(Fraction(str(item))) if item.is_Float else None


def _is_real(number: Value) -> bool:
    imaginary = getattr(number, "imag", 0)
    return isinstance(number, Fraction) or abs(imaginary) <= abs(number) * Fraction(1, 10**30)


def equal_values(first: Value, second: Value) -> bool | None:
    """Whether two values are equal; None if both are so small that rounding may have made them."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    mp = context(DIGITS)
    one, other = real_number(mp, first), real_number(mp, second)
    size = max(abs(one), abs(other))
    if abs(one - other) <= size * mp.mpf(10) ** -40:
        return True
    return None if size < mp.mpf(10) ** -40 else False


def _same_relation(wanted: Any, answer: Any) -> bool:
    if _kind(wanted) == _kind(answer) == "relation":
        parts = [getattr(item, "_unsorted_args", item.args) if type(item).__name__ in ("And", "Or") else [item]
                 for item in (wanted, answer)]  # fmt: skip
        if type(wanted).__name__ in ("And", "Or") and type(wanted).__name__ != type(answer).__name__:
            return _same_ranges(wanted, answer)
        if len(parts[0]) == len(parts[1]) and matched(parts[0], parts[1], _same_one_relation):
            return True
        return _same_ranges(wanted, answer)
    if "set" in (_kind(wanted), _kind(answer)):
        return _same_ranges(wanted, answer)
    return False


def _same_one_relation(wanted: Any, answer: Any) -> bool:
    """Equations with the same solutions, as far as a constant factor or a linear unknown shows it; inequalities with
    the same direction up to a positive factor.
    """
    sides = [(item.lhs, item.rhs) for item in (wanted, answer)]
    if any(_kind(side) != "expression" for pair in sides for side in pair):
        return type(wanted) is type(answer) and all(_same(one, other) for one, other in zip(*sides, strict=True))
    one, other = (_DIRECTIONS[type(item).__name__] for item in (wanted, answer))
    if one[1] != other[1]:
        return False
    from sympy import Add, Mul

    differences = [Add(left, Mul(-1, right, evaluate=False), evaluate=False) for left, right in sides]
    names = sorted(_names(differences[0]) | _names(differences[1]))
    ratios = list(_ratios(differences, names))
    if len(ratios) >= _NEEDED and all(equal_values(ratio, ratios[0]) for ratio in ratios):
        turned = one[0] != other[0]
        return one[0] == "=" or (_is_real(ratios[0]) and (real_number(context(DIGITS), ratios[0]).real < 0) == turned)
    return one[0] == "=" and any(_same_root(differences, names, name) for name in names)


_DIRECTIONS = {
    "Equality": ("=", ""), "Unequality": ("=", "not"),
    "StrictGreaterThan": (">", "strict"), "StrictLessThan": ("<", "strict"),
    "GreaterThan": (">", "or equal"), "LessThan": ("<", "or equal"),
}  # fmt: skip


def _ratios(differences: Sequence[Any], names: Sequence[str]) -> Iterator[Value]:
    mp = context(DIGITS)
    for point in _points(names) if names else ():
        try:
            first, second = (value(difference, point) for difference in differences)
        except NoValueError:
            continue
        if first == 0 or second == 0:
            continue
        both = isinstance(first, Fraction) and isinstance(second, Fraction)
        yield first / second if both else real_number(mp, first) / real_number(mp, second)


def _same_root(differences: Sequence[Any], names: Sequence[str], name: str) -> bool:
    """Whether both equations are linear in `name` and have the same solution for it wherever both have one."""
    compared = 0
    for point in _points([other for other in names if other != name] or [name]):
        try:
            roots = [linear_root(partial(_value_at, difference, name, point)) for difference in differences]
        except NoValueError:
            continue
        if None in roots or not equal_values(*roots):
            return False
        compared += 1
    return compared >= _NEEDED


def _value_at(item: Any, name: str, point: Mapping[str, Fraction], place: Any) -> Value:
    return value(item, {**point, name: place})


def linear_root(function: Callable[[Any], Value]) -> Value | None:
    """The zero of a linear function; None if the function is constant or not linear."""
    mp = context(DIGITS)
    *at, before = [function(Fraction(place)) for place in (3, 5, 9, -7)]
    if all(isinstance(number, Fraction) for number in (*at, before)):
        slope = (at[1] - at[0]) / 2
        straight = at[2] - at[0] == 6 * slope and at[0] - before == 10 * slope
    else:
        *at, before = [real_number(mp, number) for number in (*at, before)]
        slope = (at[1] - at[0]) / 2
        bends = abs(at[2] - at[0] - 6 * slope), abs(at[0] - before - 10 * slope)
        straight = max(bends) <= mp.mpf(10) ** -40 * (1 + abs(at[2]))
        if abs(slope) < mp.mpf(10) ** -40:
            slope = 0
    return None if not straight or slope == 0 else 3 - at[0] / slope


def _same_ranges(wanted: Any, answer: Any) -> bool:
    if _kind(wanted) == _kind(answer) == "relation" and _names(wanted) != _names(answer):
        return False
    return unknown_and_ranges(wanted)[1].same(unknown_and_ranges(answer)[1])


def unknown_and_ranges(item: Any) -> tuple[str | None, Ranges]:
    """The unknown of a relation, with the numbers that satisfy it; for a set, None and its numbers.

    Raises `NoValueError` for anything else, and for relations that are not linear in exactly one unknown.
    """
    if _kind(item) == "set":
        return None, ranges_of_set(item)
    names = _names(item)
    if _kind(item) != "relation" or len(names) != 1:
        raise NoValueError
    name = names.pop()
    return name, range_of_relation(item, name, linear_root)


def _same_set(wanted: Any, answer: Any) -> bool:
    items = [_items(item) for item in (wanted, answer)]
    if items[0] is not None and items[1] is not None:
        return matched(items[0], items[1], _same)
    if "relation" in (_kind(wanted), _kind(answer)):
        return _same_relation(wanted, answer)
    if _kind(wanted) != "set" or _kind(answer) != "set":
        return False
    return _same_ranges(wanted, answer)


def _items(item: Any) -> Sequence[Any] | None:
    """The items of a finite set or of a single expression; None for an interval and other sets."""
    if type(item).__name__ == "FiniteSet":
        return list(item.args)
    return None if _kind(item) == "set" else [item]


def matched(wanted: Sequence[Any], answer: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether the items of two sequences can be paired so that both of every pair are the same."""
    if len(wanted) != len(answer) or len(wanted) > ITEMS:
        return False
    left = list(answer)
    for item in wanted:
        place = next((place for place, other in enumerate(left) if same(item, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _same_tuple(wanted: Any, answer: Any) -> bool:
    pair = [list(getattr(item, "_unsorted_args", item.args)) for item in (wanted, answer)]
    if "FiniteSet" not in (type(wanted).__name__, type(answer).__name__) and _kind(wanted) != _kind(answer):
        return False
    return len(pair[0]) == len(pair[1]) <= ITEMS and all(map(_same, *pair))


def _same_matrix(wanted: Any, answer: Any) -> bool:
    """Matrices of the same shape with the same entries; multiples of a matrix and sums are written as one matrix."""
    if _kind(wanted) != _kind(answer) or wanted.shape != answer.shape:
        return False
    ours, theirs = _entries(wanted), _entries(answer)
    return ours is not None and theirs is not None and all(map(_same, ours, theirs))


def _entries(item: Any) -> Sequence[Any] | None:
    """The entries of a matrix, row by row; None for products of matrices, and for more than `ITEMS` entries."""
    from sympy import Add, MatrixBase, Mul

    if isinstance(item, MatrixBase):
        return list(item.flat()) if len(item) <= ITEMS else None
    factors = [part for part in item.args if _kind(part) == "expression"]
    matrices = [_entries(part) for part in item.args if _kind(part) == "matrix"]
    known = [entries for entries in matrices if entries is not None]
    if len(known) < len(matrices) or len(factors) + len(matrices) < len(item.args):
        return None
    if item.is_MatMul and len(known) == 1:
        return [Mul(*factors, entry, evaluate=False) for entry in known[0]]
    if item.is_MatAdd and not factors:
        return [Add(*parts, evaluate=False) for parts in zip(*known, strict=True)]
    return None


_BY_KIND: Mapping[str, Callable[[Any, Any], bool]] = {
    "matrix": _same_matrix,
    "tuple": _same_tuple,
    "relation": _same_relation,
    "set": _same_set,
}
