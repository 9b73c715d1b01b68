"""Answers to the questions of a study, from answers that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from gruppo.runs.eval_metrics import Question as Answers
from gruppo.study.answers import Answered, answer, value_of
from gruppo.study.file import StudyFile, read_study


@pytest.fixture
def file(study_file: Path) -> StudyFile:
    return read_study(study_file)


def answers(pattern: str) -> list[Answers]:
    """One question per letter: "2", "1" and "0" of its two answers are right."""
    right = {"2": [True, True], "1": [True, False], "0": [False, False]}
    return [
        Answers(str(place), f"q{place}", right[letter], ["a" if one else "b" for one in right[letter]])
        for place, letter in enumerate(pattern)
    ]


def of(low: list[str], high: list[str], initial: str) -> Answered:
    final = {("letters", "low", seed): answers(pattern) for seed, pattern in enumerate(low, start=1)}
    final |= {("letters", "high", seed): answers(pattern) for seed, pattern in enumerate(high, start=1)}
    before = (-1, answers(initial))
    return Answered(final, {("letters", arm, seed): before for arm in ("low", "high") for seed in (1, 2)})


def test_a_clear_difference_is_claimed(file: StudyFile) -> None:
    learned, rates = answer(file, of(["2212212221", "2122221222"], ["0100000000", "0000001000"], "0000100000"))
    assert learned["difference"] == pytest.approx(0.825)  # 17 and 18 of 20, minus 1 of 20
    assert learned["seeds"] == [1, 2]
    assert learned["p"] < 0.001
    assert learned["answer"] == "low | rate is higher than the model before training"
    assert rates["difference"] == pytest.approx(-0.9)  # pass@2: all of 10, against 1 of 10
    assert rates["answer"] == "high is lower than low | rate"


def test_nothing_is_claimed_from_one_seed(file: StudyFile) -> None:
    learned, rates = answer(file, of(["2222222222"], ["0000000000"], "0000000000"))
    assert learned["difference"] == 1
    for found in (learned, rates):
        assert found["p"] is found["p_holm"] is found["interval"] is None
        assert found["answer"] == "no claim: one seed says nothing about others"
        assert found["missing_seeds"] == [2]


def test_correction_counts_all_questions(file: StudyFile) -> None:
    """p = 0.03 alone would be claimed; beside another question it is not."""
    found = answer(file, of(["2100110000", "2010101000"], ["2000110001", "2010100000"], "1000010000"))
    assert found[0]["p_holm"] == pytest.approx(min(1.0, 2 * found[0]["p"]))
    assert "it is not shown that" in found[0]["answer"]
    assert "no difference is shown" in found[1]["answer"]


def test_a_one_sided_question_is_not_answered_by_the_other_side(file: StudyFile) -> None:
    learned, _ = answer(file, of(["0000000000", "0000000000"], ["0", "0"], "2221222222"))
    assert learned["interval"][1] < 0
    assert learned["answer"] == "it is not shown that low | rate is higher than the model before training"


def test_questions_that_differ_are_not_compared(file: StudyFile) -> None:
    _, rates = answer(file, of(["22", "22"], ["222", "22"], "00"))
    assert rates["seeds"] == [2]


def test_values_of_an_arm() -> None:
    table = {1: {"a": 1.0, "b": 0.0}, 2: {"a": 1.0, "b": 0.5}}
    found = value_of(table)
    assert found is not None
    assert found["mean"] == pytest.approx(0.625)
    assert found["seeds"] == {"1": 0.5, "2": 0.75}
    assert found["interval"][0] == 0, "two questions say little"
    assert value_of({}) is None
