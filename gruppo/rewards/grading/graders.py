"""Graders: (text, columns of the row) -> whether the text is correct.

A reference that is a list means alternatives: the text is correct if it is correct by any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from gruppo.config.renames import GRADERS as RENAMED
from gruppo.data.references import answer_text, for_each, with_one_reference
from gruppo.errors import UsageError, nearest
from gruppo.rewards.grading.last_number import same_text
from gruppo.types import Row
from gruppo.utils.imports import import_attribute

Grader = Callable[[str, Mapping[str, Any]], bool]


def _grade_number(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.numbers import grade_number

    by_time = _grade_time(text, columns)
    return grade_number(text, columns["answer"], question_of(columns)) if by_time is None else by_time


def _grade_word_problem(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.words import grade_word_problem

    by_time = _grade_time(text, columns)
    return grade_word_problem(text, columns["answer"], question_of(columns)) if by_time is None else by_time


def _grade_time(text: str, columns: Mapping[str, Any]) -> bool | None:
    """The grade if the reference is a time of day, else None."""
    from gruppo.rewards.grading.times import grade_time

    return grade_time(text, _solution(columns), question_of(columns))


def _grade_exact(text: str, columns: Mapping[str, Any]) -> bool:
    return same_text(text, columns["answer"])


def _grade_math(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.formulas import grade_formula

    by_time = _grade_time(text, columns)
    return grade_formula(text, _solution(columns), question_of(columns)) if by_time is None else by_time


def _grade_science(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.formulas import grade_science

    by_time = _grade_time(text, columns)
    return grade_science(text, _solution(columns), question_of(columns)) if by_time is None else by_time


def _grade_choice(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.choices import grade_choice

    return grade_choice(text, columns["answer"], columns)


def question_of(columns: Mapping[str, Any]) -> str:
    """The text of a row's question, from the column `question` or `problem`; "" if it has neither."""
    return str(columns.get("question", columns.get("problem", "")))


def _solution(columns: Mapping[str, Any]) -> Any:
    return columns["answer"] if "answer" in columns else columns["solution"]


@dataclass(frozen=True)
class _Comparison:
    """A grader of one reference. `names`: its columns, the preferred one first. `convert`: applied to the reference."""

    grade: Grader
    names: tuple[str, ...]
    convert: Callable[[Any], Any]

    def __call__(self, text: str, columns: Mapping[str, Any]) -> bool:
        """Whether the text is correct by any of the row's references."""
        return any(for_each(partial(self.grade, text), self.rows(columns)))

    def rows(self, columns: Mapping[str, Any]) -> list[Row]:
        """The row once per alternative of its reference. Raises UsageError if it has none."""
        return with_one_reference(columns, self.names, self.convert)


def _grade_gym(text: str, columns: Mapping[str, Any]) -> bool:
    """Whether the text gets the full score of the row's reasoning-gym dataset; partial credit is incorrect."""
    from gruppo.data.reasoning_gym import score

    return score(text, columns) >= 1.0


COMPARISONS = {
    "numeric_answer": _Comparison(_grade_number, ("answer",), answer_text),
    "word_problem": _Comparison(_grade_word_problem, ("answer",), answer_text),
    "exact_match": _Comparison(_grade_exact, ("answer",), lambda answer: answer),
    "math_answer": _Comparison(_grade_math, ("answer", "solution"), answer_text),
    "ocw": _Comparison(_grade_science, ("answer", "solution"), answer_text),
    "choice": _Comparison(_grade_choice, ("answer",), lambda answer: answer),
}
GRADERS: dict[str, Grader] = {**COMPARISONS, "reasoning_gym": _grade_gym}


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
