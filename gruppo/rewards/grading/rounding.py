"""When a rounded number counts as the number: decimals as answers or references in mathematics.

An integer, a fraction, a root or a multiple of π as the reference is exact. A decimal reference is right to its last
digit only.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

NOISE = Fraction(1, 10**12)  # relative error of floating-point arithmetic
SIGNIFICANT = 6  # digits of a decimal answer for a fraction that does not terminate, or for a longer decimal
LONGEST = 10_000  # bits of a number whose digits are counted
REFERENCE = 3  # decimals, and digits, of a decimal reference to which an exact answer may be rounded


def rounds_to(answer: Any, answer_decimals: int | None, wanted: Any, wanted_decimals: int | None) -> bool:
    """Whether an answer is right by rounding. The values are `Fraction`, or real numbers of mpmath if irrational;
    `…_decimals` is the number of decimals for a decimal, and None or 0 for any other number.

    - A decimal reference with three or more decimals, or four or more digits, accepts a longer or exact answer that
      rounds to it.
    - A fraction that does not terminate, and a longer decimal, accept a decimal of six or more digits that is rounded
      or cut off at its last digit.
    - A decimal reference accepts the noise of floating-point arithmetic.
    """
    irrational = not isinstance(wanted, Fraction)
    answer, wanted = _rational(answer), _rational(wanted)
    difference = abs(answer - wanted)
    if wanted_decimals:
        if difference <= abs(wanted) * NOISE:
            return True
        if not answer_decimals or answer_decimals > wanted_decimals:
            digits = significant(wanted) if wanted_decimals >= REFERENCE else significant(wanted) - 1
            return digits >= REFERENCE and 2 * difference <= Fraction(1, 10**wanted_decimals)
    if not answer_decimals or irrational or significant(answer) < SIGNIFICANT:
        return False
    longer = answer_decimals < wanted_decimals if wanted_decimals else not terminates(wanted)
    cut = abs(answer) <= abs(wanted) and answer * wanted > 0
    return longer and (1 if cut else 2) * difference < Fraction(1, 10 ** decimals(answer))


def _rational(number: Any) -> Fraction:
    """A real number of mpmath as the fraction that it is in binary; a `Fraction` unchanged."""
    if isinstance(number, Fraction):
        return number
    sign, mantissa, exponent, _ = number.real._mpf_
    size = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -size if sign else size


def decimals(number: Fraction) -> int:
    """Decimals of a number that terminates, without zeros at the end."""
    under, places = number.denominator, 0
    while under > 1:
        under //= 10 if under % 10 == 0 else 5 if under % 5 == 0 else 2
        places += 1
    return places


def significant(number: Fraction) -> int:
    """Significant digits of a number that terminates, without zeros at the end."""
    digits = abs(number.numerator) * 10 ** decimals(number) // number.denominator
    return len(str(digits).strip("0")) if digits.bit_length() < LONGEST else LONGEST


def terminates(number: Fraction) -> bool:
    """Whether a number can be written as a decimal of finite length."""
    under = number.denominator
    for prime in (2, 5):
        while under % prime == 0:
            under //= prime
    return under == 1
