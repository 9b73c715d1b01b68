"""Rewards that compare completions with a reference answer, or with several if the answer is a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gruppo.data.references import alternatives, answer_text, for_each
from gruppo.errors import UsageError
from gruppo.rewards import text_of
from gruppo.rewards.grading.choices import grade_choice
from gruppo.rewards.grading.last_number import same_number, same_text
from gruppo.rewards.grading.math_verify import same_mathematics


def last_number(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if the last number of a completion equals the last number of its answer, else 0; None without an answer.

    Raises UsageError if an answer contains no number.
    """
    return [
        _value(text_of(completion), wanted, same_number) for completion, wanted in zip(completions, answer, strict=True)
    ]


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if a completion equals its answer, ignoring white space at both ends, else 0; None without an answer."""
    return [
        _value(text_of(completion), wanted, same_text) for completion, wanted in zip(completions, answer, strict=True)
    ]


def choice(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 if a completion chooses exactly the options of its answer ("B", "AD"), else 0: the grader of the same name.

    Options are read from the column `choices` or `options`; without either, only letters count. None if the answer is
    not a letter, and neither the index nor the text of an option.
    """
    given = [name for name in ("choices", "options") if columns.get(name) is not None]
    return [
        _chosen(text_of(completion), wanted, {name: columns[name][place] for name in given})
        for place, (completion, wanted) in enumerate(zip(completions, answer, strict=True))
    ]


def _value(text: str, reference: Any, same: Callable[[str, Any], bool]) -> float | None:
    """1 if the text is the same as any alternative of the reference, else 0; None without a reference."""
    wanted = alternatives(reference)
    return float(any(for_each(partial(same, text), wanted))) if wanted else None


def _chosen(text: str, reference: Any, columns: Mapping[str, Any]) -> float | None:
    try:
        return _value(text, reference, lambda text, wanted: grade_choice(text, wanted, columns))
    except UsageError:
        return None


class MathVerify:
    """1 if a completion's answer equals the reference symbolically (math-verify), else 0.

    The reference is the column `answer`, or `solution` if the row has no `answer`: a number, LaTeX with or without
    dollar signs, a text with \\boxed{}, or a solution that ends with "#### 42". The value is None if there is no
    reference, or if it cannot be read. Formulas above fixed limits of size equal nothing. Raises UsageError if the row
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
    ) -> list[float | None]:
        if answer is None and solution is None:
            raise UsageError("the row has neither answer nor solution; add one of these columns")
        missing = [None] * len(completions)
        rows = zip(completions, answer or missing, solution or missing, strict=True)
        return [
            _equal(text_of(completion), alternatives(first) or alternatives(second))
            for completion, first, second in rows
        ]


def _equal(text: str, references: Sequence[Any]) -> float | None:
    """1 if the text equals any of the references, else 0; None if none of them can be read."""
    outcomes = [same_mathematics(text, answer_text(reference)) for reference in references]
    return 1.0 if True in outcomes else 0.0 if False in outcomes else None
