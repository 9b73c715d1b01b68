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
    """1 if the last number of a completion equals the last number of its answer, else 0.

    Raises UsageError if an answer contains no number.
    """
    return [
        float(same_number(text_of(completion), wanted)) for completion, wanted in zip(completions, answer, strict=True)
    ]


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 if a completion equals its answer, ignoring leading and trailing white space, else 0."""
    return [
        float(same_text(text_of(completion), wanted)) for completion, wanted in zip(completions, answer, strict=True)
    ]


def choice(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if a completion chooses exactly the letters of its answer ("B", "AD"), else 0.

    None if the answer is not a letter. Only letters are rewarded: unlike in the grader of this name, the words or the
    value of an option do not count.
    """
    return [_chosen(text_of(completion), wanted) for completion, wanted in zip(completions, answer, strict=True)]


def _chosen(text: str, reference: Any) -> float | None:
    try:
        wanted = letters_of(reference, ())
    except UsageError:
        return None
    chosen = choice_of(text, (), LETTERS)
    return float(chosen is not None and chosen.letters == wanted and not chosen.undecided)


class MathVerify:
    """1 if a completion's answer equals the reference symbolically (math-verify), else 0.

    The reference is the column `answer`, or `solution` if there is no `answer`: a number, LaTeX with or without dollar
    signs, a text with \\boxed{}, or a solution that ends with "#### 42". The value is None if the reference cannot be
    read. If a comparison takes too long, only its completion fails, with a TimeoutError. Raises UsageError if the row
    has neither column.
    """

    any_of = ("answer", "solution")

    def __init__(self) -> None:
        import math_verify  # noqa: F401  imports sympy, which is slow, before the first call

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
        return [
            _equal(text_of(completion), reference)
            for completion, reference in zip(completions, references, strict=True)
        ]


def _equal(text: str, reference: Any) -> float | TimeoutError | None:
    try:
        equal = same_mathematics(text, reference)
    except TimeoutError as error:
        return error
    return None if equal is None else float(equal)
