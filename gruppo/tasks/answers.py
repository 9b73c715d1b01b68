"""Reading numbers out of text, exactly; for rewards and for the graders of evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from gruppo.errors import UsageError, nearest
from gruppo.imports import import_attribute

# A sign counts unless it follows a number or a closing bracket, where it is an operator:
# "5-3" ends with 3, and so does "5 - 3".
_SIGN = r"(?:(?<![\d\w)\].])[-−+])?"
_FRACTION = rf"{_SIGN}(?<![\d./])\d+/\d+(?![\d/]|\.\d)"
_DECIMAL = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|{_SIGN}(?<![\d.])\.\d+"
_NUMBER = re.compile(f"{_FRACTION}|{_DECIMAL}", re.ASCII)

Grader = Callable[[str, Mapping[str, Any]], bool]


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


def _grade_number(text: str, columns: Mapping[str, Any]) -> bool:
    return same_number(text, _answer(columns))


def _grade_exact(text: str, columns: Mapping[str, Any]) -> bool:
    return same_text(text, _answer(columns))


def _answer(columns: Mapping[str, Any]) -> Any:
    if "answer" not in columns:
        raise UsageError(f"a question has no answer (columns: {', '.join(columns) or 'none'}); add a column answer")
    return columns["answer"]


def _grade_gym(text: str, columns: Mapping[str, Any]) -> bool:
    """Full score by the rules of the row's reasoning-gym data set; part of it is not right."""
    from gruppo.tasks.gym import score

    return score(text, columns) >= 1.0


GRADERS: dict[str, Grader] = {
    "number": _grade_number,
    "exact_match": _grade_exact,
    "reasoning_gym": _grade_gym,
}


def find_grader(name: str) -> Grader:
    """The grader of that name or import path: (text, columns) -> right or wrong. Raises UsageError for an unknown
    one."""
    if name in GRADERS:
        return GRADERS[name]
    if ":" not in name:
        raise UsageError(f'evaluation.grader = "{name}": unknown grader{nearest(name, GRADERS)}')
    grader: Grader = import_attribute(name, "evaluation.grader")
    return grader
