"""How the answer of a text is extracted."""

from __future__ import annotations

import time

import pytest

from gruppo.data.boxes import boxes, last_box
from gruppo.rewards.grading.extraction import decisions, own_answer


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("The answer is 5.", ["answer is"]),
        ("\\boxed{5}", ["boxed"]),
        ("The answer is \\boxed{5}.", ["answer is", "boxed"]),
        ("#### 5", ["####"]),
        ("#### 2. Compute", []),
        ("<answer>5</answer>", ["tags"]),
        ("Answer: 5", ["label"]),
        ("We check our answer: 5", []),
        ("The answer is not 5.", []),
        ("答案是5", ["answer is"]),
        ("答：5", ["label"]),
        ("5", []),
        ("\\boxed{5", []),
        ("\\boxed{}", []),
    ],
)
def test_decisions(text: str, rules: list[str]) -> None:
    assert [decision.rule for decision in decisions(text)] == rules


def test_boxes_have_balanced_braces() -> None:
    assert [box.content for box in boxes("\\boxed{\\frac{1}{2}} \\fbox{\\{1\\}} \\boxed 5 \\boxed{x")] == [
        "\\frac{1}{2}",
        "\\{1\\}",
        "5",
    ]


def test_adjacent_boxes_are_one_list() -> None:
    assert last_box("$x = \\boxed{-2}$ and $x = \\boxed{1}$") == (5, "-2, 1")
    box = last_box("\\boxed{3} is wrong. So \\boxed{4}")
    assert box is not None
    assert box[1] == "4"
    assert last_box("none") is None


def test_own_answer_ends_where_the_next_question_starts() -> None:
    assert own_answer("\\boxed{5}\n\nQuestion: 2 + 2?\nAnswer: 4") == "\\boxed{5}\n"
    assert own_answer("答案是5\n\n问题：二") == "答案是5\n"
    restated = "Let me restate.\nQuestion: 2 + 2?\nThe answer is 4."
    assert own_answer(restated) == restated  # no answer comes before the question


def test_thoughts_are_not_the_answer() -> None:
    assert own_answer("<think>\\boxed{3}</think>\\boxed{4}") == "\\boxed{4}"
    assert own_answer("<think>\\boxed{3}</think>") == "<think>\\boxed{3}</think>"


@pytest.mark.parametrize(
    "part", ["\\boxed{", "the answer is ", "####", "$", "A, ", "1,234 ", "Answer: ", "(", "{", "9"]
)
def test_long_texts_are_read_quickly(part: str) -> None:
    """The time of every rule grows about linearly with the length of the text."""
    from gruppo.rewards.grading.choices import choice_of
    from gruppo.rewards.grading.numbers import answered_number

    text = part * (12_000 // len(part))
    start = time.process_time()
    answered_number(text)
    choice_of(text, ["1", "2"], "AB")
    assert time.process_time() - start < 10
