r"""Exact values of written arithmetic: "3 * (4 + 5)", "1/2^98", "\frac{10!}{7!}", "\sqrt{81}"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from gruppo.rewards.grading.evaluate import TooLargeError, context, power, whole_factorial

LONGEST = 200  # characters of an expression that is evaluated
NESTED = 20  # brackets in brackets

_WRITTEN: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), other)
    for pattern, other in (
        (r"\\(?:times|cdot)(?![A-Za-z])|×|·", "*"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"\*\*", "^"),
        (r"\\[dtc]?frac\s*+(?=\{)", "F"),
        (r"\\[dt]?binom\s*+(?=\{)", "B"),
        (r"\{\s*+(\d++)\s*+\\choose\s*+(\d++)\s*+\}", r"B{\1}{\2}"),
        (r"\\sqrt\s*+\[\s*+(\d{1,2})\s*+\]\s*+(?=\{)", r"N{\1}"),
        (r"\\sqrt\s*+(?=\{)|√(?=[({])", "R"),
        (r"\\sqrt\s*+(\d)|√(\d++)", r"R{\1\2}"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"(?<=!)\s*+(?=\d)", "*"),
        (r"(?<![\d.])(\d++(?:\.\d++)?)e([-+]?\d{1,3})(?!\d)", r"(\1*10^{\2})"),
    )
]
_TOKEN = re.compile(r"\d++(?:\.\d*+)?|\.\d++|[-+*/^!(){}BFNR]")


class _NoArithmeticError(Exception):
    """The text is not an arithmetic expression."""


def calculated(text: str) -> Fraction | None:
    """The exact value of an arithmetic expression of at most `LONGEST` characters, with digits, + - * / ^ !, brackets,
    fractions, binomials and even roots; None for anything else, a division by zero, and values that are too large.
    """
    if len(text) > LONGEST:
        return None
    for pattern, other in _WRITTEN:
        text = pattern.sub(other, text)
    text = text.strip().rstrip(".")
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or not tokens:
        return None
    try:
        return _Reader(tokens).all()
    except (_NoArithmeticError, TooLargeError, ZeroDivisionError, ValueError):
        return None


class _Reader:
    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.place = 0
        self.depth = 0

    def all(self) -> Fraction:
        value = self._sum()
        if self.place < len(self.tokens):
            raise _NoArithmeticError
        return value

    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self, expected: str = "") -> str:
        token = self._next()
        if not token or (expected and token != expected):
            raise _NoArithmeticError
        self.place += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next() in ("+", "-"):
            sign = self._take()
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while self._next() in ("*", "/", "(", "B", "F", "N", "R"):
            mark = self._next()
            if mark in ("*", "/"):
                self._take()
            value = value / self._signed() if mark == "/" else value * self._signed()
        return value

    def _signed(self) -> Fraction:
        if self._next() not in ("-", "+"):
            return self._power()
        self._enter()
        sign = self._take()
        value = self._signed()
        self.depth -= 1
        return -value if sign == "-" else value

    def _power(self) -> Fraction:
        base = self._atom()
        while self._next() == "!":
            self._take()
            base = whole_factorial(base)
        if self._next() != "^":
            return base
        self._enter()
        self._take()
        exponent = self._signed()
        self.depth -= 1
        return _exact(base, exponent)

    def _atom(self) -> Fraction:
        token = self._take()
        if token in ("(", "{"):
            return self._bracketed(")" if token == "(" else "}")
        if token in "BFN":
            first, second = self._group(), self._group()
            if token == "B":
                return _binomial(first, second)
            return first / second if token == "F" else _exact(second, 1 / first)
        if token == "R":
            closing = ")" if self._take() == "(" else "}"
            return _exact(self._bracketed(closing), Fraction(1, 2))
        if not token[0].isdigit() and token[0] != ".":
            raise _NoArithmeticError
        return Fraction(token)

    def _group(self) -> Fraction:
        self._take("{")
        return self._bracketed("}")

    def _bracketed(self, closing: str) -> Fraction:
        self._enter()
        value = self._sum()
        self._take(closing)
        self.depth -= 1
        return value

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > NESTED:
            raise _NoArithmeticError


def _exact(base: Fraction, exponent: Fraction) -> Fraction:
    value = power(context(15), base, exponent)
    if not isinstance(value, Fraction):
        raise _NoArithmeticError
    return value


def _binomial(total: Fraction, chosen: Fraction) -> Fraction:
    if not 0 <= chosen <= total:
        raise _NoArithmeticError
    return whole_factorial(total) / whole_factorial(chosen) / whole_factorial(total - chosen)
