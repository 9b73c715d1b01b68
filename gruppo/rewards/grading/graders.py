"""Graders: (text, columns of the row) -> whether the text is correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gruppo.config.renames import GRADERS as RENAMED
from gruppo.errors import UsageError, nearest
from gruppo.rewards.grading.last_number import same_text
from gruppo.utils.imports import import_attribute

Grader = Callable[[str, Mapping[str, Any]], bool]


def _grade_number(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.numbers import grade_number

    return grade_number(text, _answer(columns), columns)


def _grade_exact(text: str, columns: Mapping[str, Any]) -> bool:
    return same_text(text, _answer(columns))


def _grade_math(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.formulas import grade_formula

    return grade_formula(text, _solution(columns))


def _grade_science(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.formulas import grade_science

    return grade_science(text, _solution(columns), columns)


def _grade_choice(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.choices import grade_choice

    return grade_choice(text, _answer(columns), columns)


def _solution(columns: Mapping[str, Any]) -> Any:
    return columns["solution"] if "answer" not in columns and "solution" in columns else _answer(columns)


def _answer(columns: Mapping[str, Any]) -> Any:
    if "answer" not in columns:
        raise UsageError(f"a question has no answer (columns: {', '.join(columns) or 'none'}); add the column answer")
    return columns["answer"]


def _grade_gym(text: str, columns: Mapping[str, Any]) -> bool:
    """Whether the text gets the full score of the row's reasoning-gym dataset; partial credit is incorrect."""
    from gruppo.data.reasoning_gym import score

    return score(text, columns) >= 1.0


GRADERS: dict[str, Grader] = {
    "numeric_answer": _grade_number,
    "exact_match": _grade_exact,
    "math_answer": _grade_math,
    "ocw": _grade_science,
    "choice": _grade_choice,
    "reasoning_gym": _grade_gym,
}


class Named(NamedTuple):
    """A grader with its name."""

    name: str
    grader: Grader


def find_grader(name: str) -> Grader:
    """Return the grader with this name or import path: (text, columns) -> whether the text is correct.

    Raises UsageError if the name is unknown or the import fails.
    """
    if name in GRADERS:
        return GRADERS[name]
    if name in RENAMED:
        raise UsageError(f'evaluation.grader = "{name}": this grader was renamed; write "{RENAMED[name]}"')
    if ":" not in name:
        raise UsageError(f'evaluation.grader = "{name}": unknown grader{nearest(name, GRADERS)}')
    grader: Grader = import_attribute(name, "evaluation.grader")
    return grader
