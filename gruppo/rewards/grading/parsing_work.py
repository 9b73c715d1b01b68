"""Whether the parser of math-verify can read a text without a large computation.

Most of what it reads it leaves as it is written. But it works out determinants, inverse exponents, binomial
coefficients, greatest common divisors, values of the gamma function, the ends of intervals and exponentials of matrices
while it reads. What is refused here depends on the text alone, never on time, and a part of a text that is light is
light too, so it does not matter where math-verify sees a formula in it.
"""

from __future__ import annotations

import re
from math import inf, lgamma, log, log2

BITS = 400_000  # size of a number that is written as powers and factorials
ANGLE = 4_000  # the same in a text with trigonometric functions
_DEEPEST = 100  # brackets and exponents in each other
_LARGEST = 20  # binary digits of the number before a "!"


def is_light(text: str) -> bool:
    """Whether no part of a text makes the parser work out a determinant, a matrix by name or a large number."""
    if _COMPUTES.search(text) or _COUNTS.search(_COUNTED.sub(" ", text)):
        return False
    return _size(text) <= (ANGLE if _TURNS.search(text) else BITS)


_COMPUTES = re.compile(
    r"\\det(?![a-z])|\{v(?:small)?matrix|\|\s*+(?:\^\s*+(?:\{[^{}]*+\}|\S)\s*+)?_"
    r"|(?:\\|operatorname\*?[\s{\\,;:!]*+)(?:eig|diag|rref|rank|svd|nullspace|norm|simplify|factor\b|expand|apart|gram|eye"
    r"|zeros|ones|cols|rows|[hv]stack|orth)"
    r"|(?:\^\s*+\w++\s*+){3}|(?:\*\*\s*+\w++\s*+){3}|\\Gamma\b[^\d=]{0,20}\d{5}",
    re.IGNORECASE,
)
_TURNS = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
# Binomial coefficients and common divisors of numbers and plain terms.
_TERM = r"\d{1,4}(?!\d)|[\sa-df-hj-zA-DF-HJ-Z+*/()-]"
_ARGUMENT = rf"\s*\{{(?:{_TERM}|\\(?:frac|cdot|times)|\{{(?:{_TERM}){{1,20}}+\}}){{1,60}}+\}}"
_COUNTED = re.compile(
    rf"\\[dt]?binom(?:{_ARGUMENT}){{2}}"
    r"|(?:\\|operatorname\s*\{)(?:gcd|lcm)\}?[\s({]*[\d\sA-Za-z,+*-]{1,80}+(?=[)}\s]|$)"
)
_COUNTS = re.compile(r"\\[dt]?binom|\\choose|\\(?:gcd|lcm)|operatorname\s*\{(?:gcd|lcm)")


def _size(text: str) -> float:
    """Binary digits of the largest number that a text writes with digits, brackets, powers and factorials."""
    marks, place, largest = _MARK.findall(text), 0, 0.0
    while place < len(marks):
        size, place = _atom(marks, place, 0)
        largest = max(largest, size or 0)
    return largest


_MARK = re.compile(r"\d++|\\begin|[()\[\]{}!^]|\*\*|\S")


def _atom(marks: list[str], place: int, depth: int) -> tuple[float | None, int]:
    """Size of a number or a bracket with its factorials and powers, and the place after it; None if it is neither."""
    if depth > _DEEPEST:
        return inf, len(marks)
    mark, size = marks[place], None
    place += 1
    if mark.isdecimal():
        size = log2(max(int(mark), 1)) if len(mark) < 300 else len(mark) * log2(10)
    elif mark in "([{":
        size, place = _bracket(marks, place, depth + 1)
    elif mark in ("^", "**"):  # the power of something else
        return _exponent(marks, place, depth + 1)
    while place < len(marks) and marks[place] in ("!", "^", "**"):
        if marks[place] == "!":
            size, place = (None if size is None else _factorial(size)), place + 1
        else:
            exponent, place = _exponent(marks, place + 1, depth + 1)
            size = max(_power(size or 0, exponent), exponent)
    return size, place


def _exponent(marks: list[str], start: int, depth: int) -> tuple[float, int]:
    """Size of an exponent; infinite if it has a matrix, since such a power is a series."""
    if start == len(marks):
        return 0, start
    size, place = _atom(marks, start, depth)
    return (inf if "\\begin" in marks[start:place] else size or 0), place


def _bracket(marks: list[str], place: int, depth: int) -> tuple[float, int]:
    """Size of the product of the numbers in a bracket, or of their sum if that is larger."""
    total, numbers = 0.0, 0
    while place < len(marks):
        if marks[place] in ")]}":
            return total + max(numbers - 1, 0), place + 1
        size, place = _atom(marks, place, depth)
        if size is not None:
            total, numbers = total + size, numbers + 1
    return total + max(numbers - 1, 0), place


def _power(base: float, exponent: float) -> float:
    if not base:
        return 0
    return inf if exponent > 2 * _LARGEST else base * 2**exponent


def _factorial(size: float) -> float:
    return inf if size > _LARGEST else lgamma(2**size + 1) / log(2)
