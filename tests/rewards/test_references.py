"""References that are lists (alternatives), numbers or truth values, and missing ones: the same in every checker."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gruppo.data.benchmark_rows import read_choice, read_formula, read_number, read_row
from gruppo.data.references import listed_in
from gruppo.errors import UsageError
from gruppo.rewards.answers import MathVerify, choice, exact_match, last_number
from gruppo.rewards.grading.graders import GRADERS
from gruppo.rewards.grading.verdicts import verdicts

REWARDS = {"last_number": last_number, "exact_match": exact_match, "math_verify": MathVerify(), "choice": choice}
ALTERNATIVES = [
    ("numeric_answer", ["7", "70"], ["7", "70"], ["8", "7 and 70 and 5"]),
    ("numeric_answer", [7, 8.5], ["It is 7.", "8.5"], ["85"]),
    ("exact_match", ["yes", "y"], ["yes", "y "], ["['yes', 'y']", "no"]),
    ("math_answer", ["\\frac12", "2"], ["\\boxed{1/2}", "\\boxed{2}"], ["\\boxed{3}", "\\boxed{\\frac12, 2}"]),
    ("ocw", ["3", "5"], ["\\boxed{3}", "\\boxed{5}"], ["\\boxed{4}"]),
    ("choice", ["A", "C"], ["The answer is (A).", "C"], ["B", "\\boxed{AC}"]),
    ("last_number", ["7", "70"], ["so 7", "70"], ["8"]),
    ("math_verify", ["\\frac12", "2"], ["\\boxed{0.5}", "\\boxed{2}"], ["\\boxed{3}"]),
]


def correct(checker: str, text: str, answer: Any) -> bool | None:
    if checker in GRADERS and checker not in REWARDS:
        right = GRADERS[checker](text, {"answer": answer})
        assert verdicts(text, {"answer": answer}, checker).correct == right
        return right
    (value,) = REWARDS[checker]([text], answer=[answer])
    return None if value is None else bool(value)


@pytest.mark.parametrize(("checker", "answer", "right", "wrong"), ALTERNATIVES)
def test_a_list_means_alternatives(checker: str, answer: list, right: list[str], wrong: list[str]) -> None:
    for reference in (answer, tuple(answer), answer[::-1], np.array(answer, dtype=object)):
        assert [correct(checker, text, reference) for text in right] == [True] * len(right)
        assert [correct(checker, text, reference) for text in wrong] == [False] * len(wrong)


@pytest.mark.parametrize("name", ["choice", "exact_match"])
def test_grader_and_reward_of_one_name_agree_on_alternatives(name: str) -> None:
    for text, wanted in (("A", True), ("C", True), ("B", False)):
        assert GRADERS[name](text, {"answer": ["A", "C"]}) is wanted
        assert REWARDS[name]([text], answer=[["A", "C"]]) == [float(wanted)]


@pytest.mark.parametrize(
    ("answer", "choices", "text", "right"),
    [
        ("1", ["4", "5", "6"], "B", True), ("1", ["4", "5", "6"], "A", False), ("2.0", ["4", "5", "6"], "C", None),
        ('["B","C"]', ["4", "5", "6"], "The answers are B and C.", True), ('["B","C"]', ["4", "5", "6"], "C", False),
        ("K", list("abcdefghijkl"), "The answer is (K).", True), ("K", list("abcdefghijkl"), "K. k", True),
        ("A", list("abcdefghijkl"), "The answer is A. No, the answer is K.", False), ("K", ["4", "5"], "K", None),
        ("Berlin", ["Paris", "Berlin"], "B", True), ("B", ["Paris", "Berlin"], "The answer is Berlin.", True),
        ("B", None, "The answer is F.", False), ("B", None, "Berlin", False), (1.0, None, "B", True),
        ("L", list("abcdefghijkl"), "It can't be K, so it must be L.", True),
        ("L", list("abcdefghijkl"), "Not L but K.", False), ("K", list("abcdefghijkl"), "(k)", True),
    ],
)  # fmt: skip
def test_the_grader_and_the_reward_read_choices_alike(answer: Any, choices: Any, text: str, right: bool | None) -> None:
    assert choice([text], answer=[answer], choices=[choices]) == [right if right is None else float(right)]
    if right is None:
        with pytest.raises(UsageError, match="is not a letter of an option"):
            GRADERS["choice"](text, {"answer": answer, "choices": choices})
    else:
        assert GRADERS["choice"](text, {"answer": answer, "choices": choices}) is right


def test_a_list_inside_a_text_is_one_answer() -> None:
    assert exact_match(['["a", "b"]', "a"], answer=['["a", "b"]'] * 2) == [1, 0]


@pytest.mark.parametrize("missing", [None, math.nan, "", [], float("nan"), np.nan])
@pytest.mark.parametrize("text", ["None", "nan", "", "null", "[]"])
def test_a_missing_reference_matches_nothing(missing: Any, text: str) -> None:
    for reward in REWARDS.values():
        assert reward([text], answer=[missing]) == [None]
    for name in set(GRADERS) - {"reasoning_gym"}:
        with pytest.raises(UsageError, match="has no answer"):
            GRADERS[name](text, {"answer": missing})


def test_the_solution_counts_if_the_answer_is_missing() -> None:
    assert MathVerify()(["7", "8"], answer=[None, "8"], solution=["so \\boxed{7}", "9"]) == [1, 1]
    assert GRADERS["math_answer"]("\\boxed{7}", {"answer": None, "solution": "so \\boxed{7}"})


@pytest.mark.parametrize("answer", [["a", None], [["a"]], [{"a": 1}], {"a": 1}, ["a", ""]])
def test_members_that_are_no_answers_are_refused(answer: Any) -> None:
    with pytest.raises(UsageError, match="neither text nor a number"):
        exact_match(["a"], answer=[answer])


def test_alternatives_that_a_checker_cannot_read_are_skipped_unless_it_can_read_none() -> None:
    assert last_number(["4", "5"], answer=[["four", "4"]] * 2) == [1, 0]
    with pytest.raises(UsageError, match="contains no number"):
        last_number(["4"], answer=[["four", "vier"]])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (5, ["5"], ["5.1"]), (5.0, ["5", "5.0"], ["50"]), (True, ["True", "true"], ["1", "false"]),
        (False, ["false"], ["0", ""]), (np.float64(5), ["5"], ["6"]), (np.int64(5), ["5"], ["6"]),
        (1e-7, ["1e-07", "0.0000001"], ["7"]),
    ],
)  # fmt: skip
def test_numbers_and_truth_values_as_texts(answer: Any, right: list[str], wrong: list[str]) -> None:
    assert exact_match([*right, *wrong], answer=[answer] * len([*right, *wrong])) == [1] * len(right) + [0] * len(wrong)


def test_a_small_float_is_not_its_exponent() -> None:
    assert last_number(["7", "0.0000001"], answer=[1e-7, 1e-7]) == [0, 1]
    assert GRADERS["choice"]("C", {"answer": 2.0, "choices": ["1", "2", "3"]})


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('["4","5"]', ["4", "5"]), (" [1, 2.50] ", ["1", "2.5"]), ("['a', 'b']", ["a", "b"]),
        ('["1,234", "5"]', ["1,234", "5"]), ("[" * 5000 + "1,2" + "]" * 5000, None), ('["4"]', []), ("[4]", []),
        ("4, 5", []), ("(4, 5)", []), ("[4, 5", []),
    ],
)  # fmt: skip
def test_a_list_inside_a_text_has_items(text: str, items: list[str] | None) -> None:
    assert listed_in(text) == items if items is not None else listed_in(text)


@pytest.mark.parametrize("answer", ['["4","5"]', "[4, 5]", "['4', '5']", '["4 apples", "5 pears"]'])
def test_a_list_inside_a_text_needs_all_of_its_items(answer: str) -> None:
    assert last_number(["5", "4", "4 and 5", "[5, 4]", answer], answer=[answer] * 5) == [0, 0, 1, 1, 1]
    assert exact_match(["5", "4", answer], answer=[answer] * 3) == [0, 0, 1]
    for name in ("numeric_answer", "word_problem", "math_answer", "ocw", "exact_match"):
        assert not GRADERS[name]("5", {"answer": answer})
        assert not GRADERS[name]("4", {"answer": answer})
        assert GRADERS[name](answer, {"answer": answer})


def test_a_list_inside_a_text_with_other_items_than_numbers_is_matched_as_written() -> None:
    answer = '["4", "apples"]'
    assert last_number(["4", answer], answer=[answer] * 2) == [0, 1]
    assert not GRADERS["numeric_answer"]("4", {"answer": answer})
    with pytest.raises(UsageError, match="contains no number"):
        last_number(["4"], answer=['["Ann", "Bob"]'])


def test_lists_of_benchmarks_are_alternatives() -> None:
    assert read_row(read_number, {"question": "q", "answer": ["7", "#### 8"]})["answer"] == ["7", "8"]
    assert read_row(read_number, {"question": "q", "answer": [7.0]})["answer"] == "7"
    assert read_row(read_formula, {"problem": "q", "answer": ["x", "\\boxed{y}"]})["answer"] == ["x", "y"]
    assert read_row(read_choice, {"question": "q", "choices": ["1", "2", "3"], "answer": ["A", "C"]})["answer"] == [
        "A",
        "C",
    ]
