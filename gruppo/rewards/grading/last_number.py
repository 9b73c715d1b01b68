"""The last number of a text, and texts that are equal."""

from __future__ import annotations

import re
from fractions import Fraction

from gruppo.errors import UsageError

# A sign counts unless it follows a number or a closing bracket, where it is an operator:
# "5-3" ends with 3, and so does "5 - 3".
_SIGN = r"(?:(?<![\d\w)\].])[-−+])?"


_FRACTION = rf"{_SIGN}(?<![\d./])\d+/\d+(?![\d/]|\.\d)"


_DECIMAL = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|{_SIGN}(?<![\d.])\.\d+"


_NUMBER = re.compile(f"{_FRACTION}|{_DECIMAL}", re.ASCII)


def last_number(text: str) -> Fraction | None:
    """The last number of a text: sign, thousands commas, decimals and fractions like 3/4; None where there is none.

    A division by zero ("1/0") is no number, nor is one of thousands of digits, which Python refuses to read.
    """
    for found in reversed(_NUMBER.findall(text)):
        try:
            return Fraction(found.replace(",", "").replace("−", "-"))
        except (ZeroDivisionError, ValueError):
            continue
    return None


def same_number(text: str, answer: object) -> bool:
    """True if the last number of `text` equals that of `answer`. Raises UsageError where the answer has none."""
    wanted = last_number(str(answer))
    if wanted is None:
        raise UsageError(f"answer = {answer!r}: holds no number; write a number, or take the grader exact_match")
    return last_number(text) == wanted


def same_text(text: str, answer: object) -> bool:
    """True if text and answer are equal, white space at the ends apart."""
    return text.strip() == str(answer).strip()
