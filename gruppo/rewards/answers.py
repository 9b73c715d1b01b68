"""Rewards that compare completions with a reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gruppo.data.options import LETTERS, letters_of
from gruppo.errors import UsageError
from gruppo.rewards import text_of
from gruppo.rewards.grading.choices import choice_of
from gruppo.rewards.grading.last_number import same_number, same_text
from gruppo.rewards.grading.math_verify import same_mathematics


def last_number(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the last number of a completion equals the last number of its answer, else 0."""
    return [float(same_number(text_of(each), right)) for each, right in zip(completions, answer, strict=True)]


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where a completion equals its answer, white space at the ends apart, else 0."""
    return [float(same_text(text_of(each), right)) for each, right in zip(completions, answer, strict=True)]


def choice(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 where a completion decides for the letters of its answer ("B", "AD"), by letter, else 0.

    None where the answer is no letter. The words or the value of an option do not count, as they do for the grader:
    what is rewarded is the letter.
    """
    return [_chosen(text_of(each), right) for each, right in zip(completions, answer, strict=True)]


def _chosen(text: str, reference: Any) -> float | None:
    try:
        wanted = letters_of(reference, ())
    except UsageError:
        return None
    made = choice_of(text, (), LETTERS)
    return float(made is not None and made.letters == wanted and not made.undecided)


class MathVerify:
    """1 where a completion's answer equals the reference symbolically (math-verify), else 0.

    The reference is the column `answer`, or `solution` where there is no `answer`: a number, LaTeX with or without
    dollars, a text with \\boxed{}, or a solution that ends with "#### 42". None where it cannot be read. A completion
    whose comparison takes too long fails by itself.
    """

    any_of = ("answer", "solution")

    def __init__(self) -> None:
        import math_verify  # noqa: F401  sympy takes its time, which is not the first call's

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | TimeoutError | None]:
        references = answer if answer is not None else solution
        if references is None:
            raise UsageError("the row has neither answer nor solution; add one of these columns")
        return [_equal(text_of(each), right) for each, right in zip(completions, references, strict=True)]


def _equal(text: str, reference: Any) -> float | TimeoutError | None:
    try:
        equal = same_mathematics(text, reference)
    except TimeoutError as error:
        return error
    return None if equal is None else float(equal)
