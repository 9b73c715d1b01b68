"""Figures of evaluation against counting every subset, and against numbers worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from gruppo.utils.stats import best_at_k, majority_at_k, pass_at_k, smallest_difference, weighted_vote, wilson_interval


def test_pass_at_k_counts_subsets_with_a_right_one() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hits = [any(number < c for number in each) for each in combinations(range(n), k)]
                assert pass_at_k(c, n, k) == pytest.approx(np.mean(hits), abs=1e-12)
    assert pass_at_k(1, 4, 2) == pytest.approx(0.5)
    assert pass_at_k(3, 10_000, 5_000) == pytest.approx(1 - math.comb(9997, 5000) / math.comb(10_000, 5000))


@pytest.mark.parametrize("wrong", [(3, 2, 1), (-1, 2, 1), (1, 2, 0), (1, 2, 3)])
def test_pass_at_k_refuses_what_cannot_be(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        pass_at_k(*wrong)


def vote(answers: list[str | None], right: dict[str | None, float]) -> float:
    """The share of the vote that right answers win, counted out."""
    counts = Counter(each for each in answers if each is not None)
    winners = [each for each, count in counts.items() if count == max(counts.values())]
    return sum(right[each] for each in winners) / len(winners) if winners else 0.0


@pytest.mark.parametrize(
    "answers",
    [
        "a",
        "ab",
        "aab",
        "abb",
        "aabb",
        "abcd",
        "aabbc",
        "aaabbcd",
        "abbccdd",
        "aabbbcc",
        "aaaaaaa",
        "a??",
        "b?aab??",
        "???",
    ],
)
def test_majority_is_the_mean_over_every_subset(answers: str) -> None:
    votes = [None if each == "?" else each for each in answers]
    right = [each == "a" for each in votes]
    chances = majority_at_k(votes, right)
    for k in range(1, len(votes) + 1):
        counted = [vote(list(each), {"a": 1, "b": 0, "c": 0, "d": 0}) for each in combinations(votes, k)]
        assert chances[k - 1] == pytest.approx(np.mean(counted), abs=1e-12), k


def test_majority_with_two_right_answers_and_one_that_is_right_at_times() -> None:
    votes, right = list("aabbc"), [True, True, True, False, True]
    chances, credit = majority_at_k(votes, right), {"a": 1.0, "b": 0.5, "c": 1.0}
    for k in range(1, 6):
        assert chances[k - 1] == pytest.approx(np.mean([vote(list(e), credit) for e in combinations(votes, k)]))


def test_majority_of_hand_worked_samples() -> None:
    """Right twice, wrong three times alike: of 10 subsets of 3, three hold two right ones and win; one is all wrong."""
    chances = majority_at_k(list("aabbb"), [True, True, False, False, False])
    assert chances[0] == pytest.approx(0.4)
    assert chances[1] == pytest.approx((1 + 6 / 2) / 10), "aa wins, six times ab ties"
    assert chances[2] == pytest.approx(3 / 10)
    assert chances[4] == 0


def test_majority_of_many_samples_stays_within_bounds() -> None:
    votes = [number % 7 if number % 3 else number for number in range(1000)]
    chances = majority_at_k(votes, [each == 1 for each in votes])
    assert np.isfinite(chances).all()
    assert ((chances > -1e-9) & (chances < 1 + 1e-9)).all()
    with pytest.raises(ValueError, match="1,000"):
        majority_at_k([1] * 1001, [True] * 1001)


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.1, 0.9], [1, 1, 1, 1], [0.3], [-1, 2, 2, -1, 0]])
def test_best_of_k_is_the_mean_over_every_subset(scores: list[float]) -> None:
    right = [number % 2 == 0 for number in range(len(scores))]
    chances = best_at_k(scores, right)
    for k in range(1, len(scores) + 1):
        counted = []
        for each in combinations(range(len(scores)), k):
            best = [number for number in each if scores[number] == max(scores[other] for other in each)]
            counted.append(np.mean([right[number] for number in best]))
        assert chances[k - 1] == pytest.approx(np.mean(counted), abs=1e-12)


def test_best_of_k_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="all numbers"):
        best_at_k([0.1, math.nan], [True, False])


def test_weighted_vote() -> None:
    assert weighted_vote(list("abb"), [True, False, False], [0.9, 0.4, 0.4]) == 1
    assert weighted_vote(list("abb"), [True, False, False], [0.7, 0.4, 0.4]) == 0
    assert weighted_vote(list("ab"), [True, False], [0.5, 0.5]) == 0.5
    assert weighted_vote([None, "b"], [False, True], [0.9, 0.1]) == 1, "who answers nothing has no vote"
    assert weighted_vote([None], [False], [0.9]) == 0


def test_smallest_difference_is_found_as_often_as_it_says() -> None:
    """Differences -1, 0, 1 of a mean at the border: a z-test at 5 % finds it in about 80 % of draws."""
    random = np.random.default_rng(0)
    pairs, share = 400, 0.3
    spread = np.array(
        [1.0] * int(pairs * share / 2) + [-1.0] * int(pairs * share / 2) + [0.0] * int(pairs * (1 - share))
    )
    border = smallest_difference(spread)
    assert border == pytest.approx((1.95996 + 0.84162) * math.sqrt(share) / math.sqrt(pairs), rel=0.03)
    up = (share + border) / 2
    drawn = random.choice([1.0, -1.0, 0.0], p=[up, share - up, 1 - share], size=(4000, pairs))
    found = np.abs(drawn.mean(axis=1) / (drawn.std(axis=1, ddof=1) / math.sqrt(pairs))) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert 0 < smallest_difference(np.zeros(100)) < 0.05, "equal pairs still promise no more than there are"


def test_wilson_interval_of_known_values() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson_interval(10, 10)[1] == 1
