"""The last number of a text, and equality of texts."""

from __future__ import annotations

import re
from fractions import Fraction

from gruppo.data.references import answer_text, answer_texts
from gruppo.errors import UsageError

# A sign belongs to the number unless it follows a number or a closing bracket, where it is an operator:
# "5-3" ends with 3, and so does "5 - 3".
_SIGN = r"(?:(?<![\d\w)\].])[-−+])?"


_FRACTION = rf"{_SIGN}(?<![\d./])\d+/\d+(?![\d/]|\.\d)"


_DECIMAL = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|{_SIGN}(?<![\d.])\.\d+"


_NUMBER = re.compile(f"{_FRACTION}|{_DECIMAL}", re.ASCII)


def last_number(text: str) -> Fraction | None:
    """The exact value of the last number of a text; None if there is none.

    Reads signs, thousands commas, decimals and fractions such as 3/4. Skips divisions by zero ("1/0") and numbers of
    thousands of digits, which Python refuses to convert.
    """
    for number in reversed(_NUMBER.findall(text)):
        try:
            return Fraction(number.replace(",", "").replace("−", "-"))
        except (ZeroDivisionError, ValueError):
            continue
    return None


def same_number(text: str, answer: object) -> bool:
    """Whether the last number of `text` equals the last number of `answer`.

    Raises UsageError if `answer` contains no number.
    """
    wanted = last_number(answer_text(answer))
    if wanted is None:
        raise UsageError(f"answer = {answer!r}: contains no number; write a number, or use the grader exact_match")
    return last_number(text) == wanted


def same_text(text: str, answer: object) -> bool:
    """Whether `text` equals a text of `answer` (see `answer_texts`), ignoring white space at both ends."""
    return text.strip() in {form.strip() for form in answer_texts(answer)}
