"""Word problems whose answer is words."""

from __future__ import annotations

import pytest

from gruppo.errors import UsageError
from gruppo.rewards.grading.graders import find_grader
from gruppo.rewards.grading.verdicts import verdicts
from gruppo.rewards.grading.words import is_numeric, names


def test_names_of_a_question() -> None:
    asked = "When Ella and Mrs. Hilt met, Bob's dog ran to Adams County College. Who won?"
    assert names(asked) == ["adams county college", "bob", "ella", "hilt"]
    assert names("") == []


@pytest.mark.parametrize(
    ("answer", "numeric"),
    [("9 (apples)", True), ("three", True), ("٩", True), ("Mrs. Hilt", False), ("They are equal", False)],
)
def test_numbers_and_words(answer: str, numeric: bool) -> None:
    assert is_numeric(answer) == numeric


def test_an_empty_reference_is_reported() -> None:
    with pytest.raises(UsageError, match="answer = '…'"):
        find_grader("word_problem")("4", {"answer": "…"})


def test_verdicts() -> None:
    assert verdicts("So 18. The answer is 20.", {"answer": "20"}, "word_problem").extracted == "20."
    verdict = verdicts("So it is \\boxed{Ann}", {"answer": "Ann", "question": "Ann or Bob?"}, "word_problem")
    assert (verdict.correct, verdict.extracted, verdict.rule) == (True, "Ann", "boxed")
