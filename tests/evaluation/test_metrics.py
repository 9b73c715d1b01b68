"""Figures of several answers per question, comparisons and plots, on numbers worked out by hand."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from gruppo.errors import UsageError
from gruppo.evaluation.formatting import format_difference, format_results
from gruppo.evaluation.plots import draw_curves
from gruppo.runs.eval_metrics import Question, compare, figure_metrics, figures, sizes


def question(number: int, right: str, votes: str | None = None, scores: list[float] | None = None) -> Question:
    """`right`: 1 or 0 an answer; `votes`: a letter an answer, "." for none; by default r where it is right, else w."""
    verdicts = [each == "1" for each in right]
    said = votes or "".join("r" if each else "w" for each in verdicts)
    return Question(f"t/{number}", f"q{number}", verdicts, [None if v == "." else v for v in said], scores)


def test_one_answer_each_is_an_accuracy_with_wilsons_interval() -> None:
    found = figures([question(0, "1"), question(1, "0"), question(2, "1"), question(3, "1")])
    assert found["accuracy"] == 0.75
    assert found["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert (found["questions"], found["samples"]) == (4, 1)
    assert "curves" not in found


def test_curves_are_means_over_questions() -> None:
    asked = [question(0, "1100", "rrab"), question(1, "0000", "aabb"), question(2, "1111")]
    found = figures(asked)
    assert found["accuracy"] == 0.5
    assert found["curves"].keys() == {"pass", "maj"}
    assert list(found["curves"]["pass"]) == ["1", "2", "4"]
    hits = np.mean([any(each) for each in combinations([1, 1, 0, 0], 2)])
    assert found["curves"]["pass"]["2"]["value"] == pytest.approx((hits + 0 + 1) / 3)
    assert found["curves"]["pass"]["4"]["value"] == pytest.approx(2 / 3)
    assert found["curves"]["maj"]["4"]["value"] == pytest.approx((1 + 0 + 1) / 3)
    low, high = found["curves"]["maj"]["4"]["interval"]
    assert low < 2 / 3 < high
    assert figure_metrics("eval/x/", found)["eval/x/maj@4"] == pytest.approx(2 / 3)


def test_scores_give_best_of_k_and_a_weighted_vote() -> None:
    asked = [question(0, "100", "rab", [0.9, 0.2, 0.1]), question(1, "100", "raa", [0.5, 0.4, 0.3])]
    found = figures(asked)
    assert found["curves"]["best"]["3"]["value"] == 1
    assert found["curves"]["best"]["1"]["value"] == pytest.approx(1 / 3)
    assert found["weighted_vote"]["value"] == 0.5, "0.9 wins alone, 0.5 loses against 0.4 + 0.3"
    assert figures([asked[0], question(1, "100")])["curves"].keys() == {"pass", "maj"}, "one has no scores"


def test_sizes_end_with_the_fewest_answers_a_question_has() -> None:
    assert sizes([question(0, "1" * 6), question(1, "0" * 9)]) == [1, 2, 4, 6]
    assert sizes([question(0, "1" * 8)]) == [1, 2, 4, 8]
    uneven = figures([question(0, "11"), question(1, "0001")])
    assert uneven["accuracy"] == pytest.approx((1 + 0.25) / 2), "questions count alike"


def test_a_comparison_is_paired_by_question() -> None:
    first = [question(number, "1" if number < 30 else "0") for number in range(100)]
    second = [question(number, "1" if 5 <= number < 45 else "0") for number in range(100)]
    found = compare(first, second[::-1])
    assert found["difference"] == pytest.approx(0.10)
    assert (found["first_only"], found["second_only"], found["questions"]) == (5, 15, 100)
    low, high = found["interval"]
    spread = np.std([1] * 15 + [-1] * 5 + [0] * 80)
    assert (low, high) == (
        pytest.approx(0.1 - 1.96 * spread / 10, abs=0.015),
        pytest.approx(0.1 + 1.96 * spread / 10, abs=0.015),
    )
    assert found["smallest"] == pytest.approx(2.8 * spread / 10, rel=0.1)
    opposite = compare(second, first)
    assert opposite["difference"] == pytest.approx(-0.10)


def test_pairing_needs_the_same_questions() -> None:
    with pytest.raises(UsageError, match="no question"):
        compare([question(0, "1")], [question(1, "1")])
    with pytest.raises(UsageError, match="'other'"):
        compare([question(0, "1")], [Question("t/0", "other", [True], ["r"])])
    found = compare([question(0, "1"), question(1, "1")], [question(1, "0"), question(2, "1")])
    assert (found["questions"], found["left_out"], found["difference"]) == (1, 2, -1)


def test_a_comparison_of_several_answers_has_differences_of_curves() -> None:
    found = compare([question(0, "1000")], [question(0, "1100", "rrab")])
    assert found["curves"]["pass"]["1"]["value"] == pytest.approx(0.25)
    assert found["curves"]["maj"]["4"]["value"] == pytest.approx(1.0)
    assert "maj@k" in "\n".join(format_difference("t", "A", "B", found))


def test_formatted_results_name_every_figure() -> None:
    found = figures([question(0, "1100", "rrab", [0.1, 0.2, 0.3, 0.4]), question(1, "0000")])
    text = "\n".join(format_results("gsm8k", found))
    assert "gsm8k: accuracy 25.0%" in text
    assert "2 questions, 4 answers each" in text
    assert "pass@k" in text
    assert "weighted vote" not in text, "not all questions have scores"
    json.dumps(found)


def test_the_picture_has_both_curves_of_both_models() -> None:
    drawn = []
    sets = [("A", figures([question(0, "10")])), ("B", figures([question(0, "11")]))]
    drawn.append(draw_curves(sets, "gsm8k"))
    (axes,) = drawn[0].axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["A: pass@k", "A: maj@k", "B: pass@k", "B: maj@k"]
    assert list(axes.get_lines()[2].get_ydata()) == [1, 1]
    with pytest.raises(UsageError, match="2 to 1,000 answers per question"):
        draw_curves([("A", figures([question(0, "1")]))], "gsm8k")


def test_answers_that_are_all_alike_still_leave_doubt() -> None:
    """Half right on every question: the bootstrap would have no width, and neither would equal differences."""
    low, high = figures([question(number, "10") for number in range(3)])["interval"]
    assert low < 0.3
    assert high > 0.7
    same = compare([question(0, "1"), question(1, "0")], [question(0, "1"), question(1, "0")])
    assert same["interval"][0] < -0.5
    assert same["interval"][1] > 0.5
    assert same["smallest"] == 1


def test_more_answers_than_can_be_counted_have_no_majority_curve() -> None:
    found = figures([question(0, "10" * 501)])
    assert found["curves"].keys() == {"pass"}
    assert found["curves"]["pass"]["1"]["value"] == pytest.approx(0.5)
