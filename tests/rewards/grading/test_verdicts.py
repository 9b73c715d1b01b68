"""Grades with their reasons and the verdicts of other rules."""

from __future__ import annotations

import threading

import pytest

from gruppo.errors import UsageError
from gruppo.rewards.grading.graders import GRADERS
from gruppo.rewards.grading.verdicts import LONGEST, verdicts


def test_a_verdict_has_the_extracted_answer_and_its_rule() -> None:
    verdict = verdicts("So 18. The answer is 20 dollars.", {"answer": "20"}, "numeric_answer")
    assert (verdict.correct, verdict.rule) == (True, "answer is")
    assert verdict.extracted == "20 dollars."
    assert verdict.others == {"answer is": True, "last number": True, "last plain number": True}
    assert not verdict.ambiguous


def test_disagreeing_rules_are_ambiguous() -> None:
    verdict = verdicts("\\boxed{18}, for the 7 days of a week.", {"answer": "18"}, "numeric_answer")
    assert verdict.correct
    assert verdict.others == {"boxed": True, "last number": False, "last plain number": False}
    assert verdict.ambiguous
    changed = verdicts("\\boxed{18}. No, the answer is 20.", {"answer": "18"}, "numeric_answer")
    assert not changed.correct
    assert changed.others["boxed"]


def test_math() -> None:
    verdict = verdicts("$x = \\frac{1}{2}$", {"answer": "0.5"}, "math_answer")
    assert (verdict.correct, verdict.extracted, verdict.rule) == (True, None, "whole text")
    assert verdict.others["math-verify"]
    boxed = verdicts("$\\boxed{\\{2,1\\}}$", {"solution": "so \\boxed{\\{1,2\\}}"}, "math_answer")
    assert boxed.others == {"boxed": True}


def test_science_reports_the_verdict_at_one_percent() -> None:
    verdict = verdicts("$\\boxed{1.61}$ cm", {"answer": "1.6"}, "ocw")
    assert not verdict.correct
    assert verdict.others["within 1 %"]
    assert verdict.ambiguous


def test_choices() -> None:
    columns = {"answer": "B", "choices": ["4", "5"]}
    verdict = verdicts("The answer is 5, not (A).", columns, "choice")
    assert (verdict.correct, verdict.extracted) == (True, "B")
    assert not verdict.others["last bracketed letter"]
    assert verdicts("", columns, "choice").rule == "none"


def test_other_graders() -> None:
    assert verdicts(" four ", {"answer": "four"}, "exact_match").extracted == "four"
    verdict = verdicts("x", {}, "tests.rewards.grading.test_verdicts:always")
    assert (verdict.correct, verdict.extracted, verdict.others) == (True, None, {})
    with pytest.raises(UsageError, match="no answer"):
        verdicts("4", {}, "numeric_answer")


def always(text: str, columns: object) -> bool:
    return True


def test_an_extracted_answer_is_short() -> None:
    verdict = verdicts("The answer is 5" + " and so on" * 100, {"answer": "5"}, "numeric_answer")
    assert verdict.extracted is not None
    assert len(verdict.extracted) <= LONGEST


@pytest.mark.parametrize(
    ("grader", "answer"),
    [
        ("numeric_answer", ""),
        ("numeric_answer", "…"),
        ("numeric_answer", None),
        ("choice", ""),
        ("choice", "…"),
        ("math_answer", ""),
        ("ocw", ""),
    ],
)
def test_an_unreadable_reference_answer_is_reported(grader: str, answer: object) -> None:
    with pytest.raises(UsageError, match="answer = "):
        GRADERS[grader]("4", {"answer": answer})


def test_math_in_a_thread() -> None:
    graded: list[bool] = []
    thread = threading.Thread(
        target=lambda: graded.append(GRADERS["math_answer"]("\\boxed{(x+1)^2 - 3}", {"answer": "x^2+2x-2"}))
    )
    thread.start()
    thread.join()
    assert graded == [True]
