"""The value of a parsed expression, by a bounded number of bounded steps.

Rational arithmetic is exact; everything else is computed with a fixed number of digits. Numbers and expressions above
the limits below raise `TooLargeError`, so the work depends on the expression only, never on the speed of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from math import factorial, isqrt
from typing import Any

STEPS = 5_000  # nodes of an expression, counted again for every term of a sum or product
BITS = 200_000  # size of an exact number
EXPONENT = 100_000  # binary exponent of a number that is not exact
ANGLE = 1_000  # binary exponent of an angle
TERMS = 1_000  # terms of a sum or product
DIGITS = 60


class TooLargeError(Exception):
    """The expression or one of its numbers is above a limit."""


class NoValueError(Exception):
    """The expression has no finite value, or is of a kind that is not evaluated."""


Value = Any  # Fraction, or a real or complex number of `context(digits)`


@lru_cache(maxsize=4)
def context(digits: int) -> Any:
    """Arithmetic with this number of decimal digits, separate from the global state of mpmath."""
    from mpmath.ctx_mp import MPContext

    found = MPContext()
    found.dps = digits
    return found


def value(expression: Any, point: Mapping[str, Fraction] | None = None, digits: int = DIGITS) -> Value:
    """The value of a sympy expression where its symbols have the values of `point`.

    The symbol i is the imaginary unit. Odd roots of negative numbers are real. Raises `TooLargeError` above a limit,
    `NoValueError` for a division by zero, an infinite value, or a kind of expression that is not evaluated.
    """
    return _Evaluation(point or {}, digits).of(expression)


class _Evaluation:
    def __init__(self, point: Mapping[str, Fraction], digits: int) -> None:
        self.point = dict(point)
        self.context = context(digits)
        self.steps = 0

    def of(self, expression: Any) -> Value:
        self.steps += 1
        if self.steps > STEPS:
            raise TooLargeError
        name = type(expression).__name__
        if expression.is_Rational:
            return Fraction(int(expression.p), int(expression.q))
        if expression.is_Float:
            return Fraction(str(expression))
        if expression.is_Symbol or name in self.point:
            return self._named(str(expression))
        if name in _CONSTANTS:
            return _CONSTANTS[name](self.context)
        if name in ("Sum", "Product"):
            return self._repeated(expression, name)
        if name not in _OPERATIONS:
            if expression.is_Function and str(expression) in self.point:
                return self.point[str(expression)]
            raise NoValueError(name)
        arguments = [self.of(argument) for argument in expression.args]
        try:
            return self._bounded(_OPERATIONS[name](self.context, *arguments))
        except (ZeroDivisionError, ValueError, TypeError, OverflowError) as error:
            raise NoValueError(name) from error

    def _named(self, name: str) -> Value:
        if name in self.point:
            return self.point[name]
        if name == "i":
            return self.context.mpc(0, 1)
        raise NoValueError(name)

    def _repeated(self, expression: Any, name: str) -> Value:
        body, *limits = expression.args
        if len(limits) != 1:
            raise NoValueError(name)
        symbol, first, last = str(limits[0][0]), self.of(limits[0][1]), self.of(limits[0][2])
        if not _whole(first) or not _whole(last):
            raise NoValueError(name)
        if last - first >= TERMS:
            raise TooLargeError
        outer, total = self.point.get(symbol), Fraction(name == "Product")
        for index in range(int(first), int(last) + 1):
            self.point[symbol] = Fraction(index)
            term = self.of(body)
            total = _times(self.context, total, term) if name == "Product" else _plus(self.context, total, term)
        if outer is None:
            self.point.pop(symbol, None)
        else:
            self.point[symbol] = outer
        return self._bounded(total)

    def _bounded(self, number: Value) -> Value:
        if isinstance(number, Fraction):
            if number.numerator.bit_length() + number.denominator.bit_length() > BITS:
                raise TooLargeError
            return number
        if not self.context.isfinite(number):
            raise NoValueError
        if abs(self.context.mag(number)) > EXPONENT if number else False:
            raise TooLargeError
        if isinstance(number, self.context.mpc) and number.imag == 0:
            return number.real
        return number


def _whole(number: Value) -> bool:
    return isinstance(number, Fraction) and number.denominator == 1


def real_number(mp: Any, number: Value) -> Any:
    """A `Fraction` as a number of the context; any other value unchanged."""
    return mp.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def _plus(mp: Any, *terms: Value) -> Value:
    if all(isinstance(term, Fraction) for term in terms):
        return sum(terms, Fraction(0))
    return mp.fsum(real_number(mp, term) for term in terms)


def _times(mp: Any, *factors: Value) -> Value:
    product: Value = Fraction(1)
    for factor in factors:
        if isinstance(product, Fraction) and isinstance(factor, Fraction):
            product *= factor
            if product.numerator.bit_length() + product.denominator.bit_length() > BITS:
                raise TooLargeError
        else:
            product = real_number(mp, product) * real_number(mp, factor)
    return product


def power(mp: Any, base: Value, exponent: Value) -> Value:
    """base ** exponent, exact where it is rational and the exponent is whole or the root comes out even."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = base.numerator.bit_length() + base.denominator.bit_length()
            if base not in (0, 1, -1) and abs(exponent) * max(1, size - 2) > BITS:
                raise TooLargeError
            return base ** (int(exponent) % 2 if base in (1, -1) else int(exponent))
        if exponent.denominator < 64:
            odd = exponent.denominator % 2 == 1
            if base < 0 and odd:
                return _times(mp, Fraction((-1) ** exponent.numerator), power(mp, -base, exponent))
            root = _root(base, exponent.denominator) if base >= 0 else None
            if root is not None:
                return power(mp, root, Fraction(exponent.numerator))
    if (
        isinstance(base, mp.mpf)
        and base < 0
        and isinstance(exponent, Fraction)
        and exponent.denominator in range(3, 64, 2)
    ):
        return (-1) ** exponent.numerator * power(mp, -base, exponent)
    base, exponent = real_number(mp, base), real_number(mp, exponent)
    if base == 0:
        if not exponent.real > 0:
            raise ZeroDivisionError
        return Fraction(0)
    if abs(mp.mag(exponent) if exponent else 0) > 64:
        raise TooLargeError
    if abs(exponent) * (abs(mp.mag(base)) + 8) > EXPONENT:
        raise TooLargeError
    return mp.power(base, exponent)


def _root(number: Fraction, degree: int) -> Fraction | None:
    """The exact root of a number that is not negative; None if it is not rational."""
    parts = [_whole_root(part, degree) for part in (number.numerator, number.denominator)]
    return None if None in parts else Fraction(parts[0] or 0, parts[1] or 1)


def _whole_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = isqrt(number)
        return root if root * root == number else None
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if middle**degree >= number else (middle + 1, high)
    return low if low**degree == number else None


def whole_factorial(number: Fraction) -> Fraction:
    """n! for a whole number. Raises ValueError for other numbers, `TooLargeError` above the limit."""
    if number < 0 or number.denominator != 1:
        raise ValueError
    if number * max(1, int(number).bit_length() - 1) > BITS:
        raise TooLargeError
    return Fraction(factorial(int(number)))


def _factorial(mp: Any, number: Value) -> Value:
    if _whole(number):
        return whole_factorial(number)
    if abs(number) > TERMS:
        raise TooLargeError
    return mp.gamma(real_number(mp, number) + 1)


def _binomial(mp: Any, total: Value, chosen: Value) -> Value:
    if _whole(total) and _whole(chosen) and total >= 0:
        if not 0 <= chosen <= total:
            return Fraction(0)
        return _factorial(mp, total) / (_factorial(mp, chosen) * _factorial(mp, total - chosen))
    return _factorial(mp, total) / (_factorial(mp, chosen) * _factorial(mp, total - chosen))


def _logarithm(mp: Any, number: Value, base: Value | None = None) -> Value:
    if number == 0:
        raise ValueError
    if number == 1:
        return Fraction(0)
    if base is None:
        return mp.log(real_number(mp, number))
    found = mp.log(real_number(mp, number)) / mp.log(real_number(mp, base))
    if isinstance(number, Fraction) and isinstance(base, Fraction) and isinstance(found, mp.mpf) and abs(found) < 10**6:
        near = Fraction(int(mp.nint(found)))
        if abs(near) * (base.numerator.bit_length() + base.denominator.bit_length()) < BITS and base**near == number:
            return near
    return found


def _function(name: str, angle: bool = False) -> Callable[..., Value]:
    def apply(mp: Any, number: Value) -> Value:
        number = real_number(mp, number)
        if number and mp.mag(number) > (ANGLE if angle else EXPONENT):
            raise TooLargeError
        return getattr(mp, name)(number)

    return apply


def _exponential(mp: Any, number: Value) -> Value:
    if abs(number) > EXPONENT // 2:
        raise TooLargeError
    return Fraction(1) if number == 0 else mp.exp(real_number(mp, number))


def _rounded(name: str) -> Callable[..., Value]:
    def apply(mp: Any, number: Value) -> Value:
        if isinstance(number, Fraction):
            return Fraction(number.__floor__() if name == "floor" else number.__ceil__())
        if isinstance(number, mp.mpc) or mp.mag(number) > 100:
            raise TooLargeError
        return Fraction(int(getattr(mp, name)(number)))

    return apply


def _extreme(pick: Callable[..., Any]) -> Callable[..., Value]:
    return lambda mp, *numbers: pick(numbers, key=lambda number: real_number(mp, number))


def _modulo(mp: Any, number: Value, modulus: Value) -> Value:
    if not isinstance(number, Fraction) or not isinstance(modulus, Fraction):
        raise ValueError
    return number % modulus


def _part(name: str) -> Callable[..., Value]:
    return lambda mp, number: getattr(mp, name)(real_number(mp, number))


_CONSTANTS: Mapping[str, Callable[[Any], Value]] = {
    "Pi": lambda mp: +mp.pi,
    "Exp1": lambda mp: +mp.e,
    "GoldenRatio": lambda mp: +mp.phi,
    "EulerGamma": lambda mp: +mp.euler,
    "ImaginaryUnit": lambda mp: mp.mpc(0, 1),
}
_OPERATIONS: Mapping[str, Callable[..., Value]] = {
    "Add": _plus,
    "Mul": _times,
    "Pow": power,
    "exp": _exponential,
    "log": _logarithm,
    "factorial": _factorial,
    "gamma": lambda mp, number: _factorial(mp, number - 1),
    "binomial": _binomial,
    "Abs": lambda mp, number: abs(number),
    "sign": lambda mp, number: Fraction((number > 0) - (number < 0)),
    "UnevaluatedExpr": lambda mp, number: number,
    "floor": _rounded("floor"),
    "ceiling": _rounded("ceil"),
    "Max": _extreme(max),
    "Min": _extreme(min),
    "Mod": _modulo,
    "re": _part("re"),
    "im": _part("im"),
    "arg": _part("arg"),
    "conjugate": _part("conj"),
    **{
        name: _function(name, angle=True)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch")
    },
    **{
        f"{prefix}{name}": _function(f"{prefix}{name}")
        for prefix in ("a",)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch")
    },
}
