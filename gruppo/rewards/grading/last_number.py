"""The last number of a text, and equality of texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from gruppo.data.references import answer_text, answer_texts, listed_in
from gruppo.errors import UsageError
from gruppo.rewards.grading.digits import ascii_digits

# A sign belongs to the number unless it follows a number or a closing bracket, where it is an operator:
# "5-3" ends with 3, and so does "5 - 3".
_SIGN = r"(?:(?<![\d\w)\].])[-−+])?"


_FRACTION = rf"{_SIGN}(?<![\d./])\d++/\d++(?![\d/]|\.\d)"


_DECIMAL = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d++)(?:\.\d++)?|{_SIGN}(?<![\d.])\.\d++"


_NUMBER = re.compile(f"{_FRACTION}|{_DECIMAL}", re.ASCII)


_LIST = re.compile(
    rf"[\s$({{\[]*+(?>{_NUMBER.pattern})(?:\s*+(?:,\s*+(?:and\s|or\s)?|;|\band\b|\bor\b)\s*+(?>{_NUMBER.pattern}))++[\s$)}}\].]*+",
    re.ASCII,
)


def last_number(text: str) -> Fraction | None:
    """The exact value of the last number of a text; None if there is none.

    Reads digits of any script, signs, thousands commas, decimals and fractions such as 3/4. Skips divisions by zero
    ("1/0") and numbers of thousands of digits, which Python refuses to convert.
    """
    return next(_last_numbers(text), None)


def _last_numbers(text: str) -> Iterator[Fraction]:
    """The numbers of a text, last one first."""
    for number in reversed(_NUMBER.findall(ascii_digits(text))):
        try:
            yield Fraction(number.replace(",", "").replace("−", "-"))
        except (ZeroDivisionError, ValueError):
            continue


def same_number(text: str, answer: object) -> bool:
    """Whether the last number of `text` equals the last number of `answer`.

    If `answer` is a list of numbers ("7, -2, and -5"), as many numbers at the end of `text` have to equal all of them,
    in any order. So for a list written inside a text ('["4", "5"]'); if one of its items has no number, `text` has to
    be written the same way. Raises UsageError if `answer` contains no number.
    """
    reference = ascii_digits(answer_text(answer))
    if items := listed_in(reference):
        members = [list(islice(_last_numbers(item), 1)) for item in items]
        if any(members):
            return _same_numbers(text, [number for (number,) in members]) if all(members) else same_text(text, answer)
    wanted = list(_last_numbers(reference)) if _LIST.fullmatch(reference) else list(islice(_last_numbers(reference), 1))
    if not wanted:
        raise UsageError(f"answer = {answer!r}: contains no number; write a number, or use the grader exact_match")
    return _same_numbers(text, wanted)


def _same_numbers(text: str, wanted: list[Fraction]) -> bool:
    return sorted(islice(_last_numbers(text), len(wanted))) == sorted(wanted)


def same_text(text: str, answer: object) -> bool:
    """Whether `text` equals a text of `answer` (see `answer_texts`), ignoring white space at both ends."""
    return text.strip() in {form.strip() for form in answer_texts(answer)}
