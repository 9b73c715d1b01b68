"""Evaluation statistics against enumeration of all subsets, and against values computed by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from gruppo.utils.stats import best_at_k, majority_at_k, pass_at_k, smallest_difference, weighted_vote, wilson_interval


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hits = [any(sample < c for sample in subset) for subset in combinations(range(n), k)]
                assert pass_at_k(c, n, k) == pytest.approx(np.mean(hits), abs=1e-12)
    assert pass_at_k(1, 4, 2) == pytest.approx(0.5)
    assert pass_at_k(3, 10_000, 5_000) == pytest.approx(1 - math.comb(9997, 5000) / math.comb(10_000, 5000))


@pytest.mark.parametrize("arguments", [(3, 2, 1), (-1, 2, 1), (1, 2, 0), (1, 2, 3)])
def test_pass_at_k_refuses_invalid_arguments(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        pass_at_k(*arguments)


def vote(answers: list[str | None], correct: dict[str | None, float]) -> float:
    """Expected correctness of a majority vote with ties broken at random, by counting."""
    counts = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(correct[answer] for answer in winners) / len(winners) if winners else 0.0


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
    votes = [None if answer == "?" else answer for answer in answers]
    correct = [answer == "a" for answer in votes]
    chances = majority_at_k(votes, correct)
    for k in range(1, len(votes) + 1):
        counted = [vote(list(subset), {"a": 1, "b": 0, "c": 0, "d": 0}) for subset in combinations(votes, k)]
        assert chances[k - 1] == pytest.approx(np.mean(counted), abs=1e-12), k


def test_majority_with_two_correct_answers_and_one_that_is_correct_in_half_of_its_samples() -> None:
    votes, correct = list("aabbc"), [True, True, True, False, True]
    chances, shares = majority_at_k(votes, correct), {"a": 1.0, "b": 0.5, "c": 1.0}
    for k in range(1, 6):
        counted = [vote(list(subset), shares) for subset in combinations(votes, k)]
        assert chances[k - 1] == pytest.approx(np.mean(counted))


def test_majority_of_samples_computed_by_hand() -> None:
    """Two correct samples, three with the same wrong answer: 3 of the 10 subsets of size 3 have two correct ones."""
    chances = majority_at_k(list("aabbb"), [True, True, False, False, False])
    assert chances[0] == pytest.approx(0.4)
    assert chances[1] == pytest.approx((1 + 6 / 2) / 10), "aa wins; the six subsets ab tie"
    assert chances[2] == pytest.approx(3 / 10)
    assert chances[4] == 0


def test_majority_of_many_samples_stays_within_bounds() -> None:
    votes = [number % 7 if number % 3 else number for number in range(1000)]
    chances = majority_at_k(votes, [answer == 1 for answer in votes])
    assert np.isfinite(chances).all()
    assert ((chances > -1e-9) & (chances < 1 + 1e-9)).all()
    with pytest.raises(ValueError, match="1,000"):
        majority_at_k([1] * 1001, [True] * 1001)


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.1, 0.9], [1, 1, 1, 1], [0.3], [-1, 2, 2, -1, 0]])
def test_best_of_k_is_the_mean_over_every_subset(scores: list[float]) -> None:
    correct = [number % 2 == 0 for number in range(len(scores))]
    chances = best_at_k(scores, correct)
    for k in range(1, len(scores) + 1):
        counted = []
        for subset in combinations(range(len(scores)), k):
            best = [number for number in subset if scores[number] == max(scores[other] for other in subset)]
            counted.append(np.mean([correct[number] for number in best]))
        assert chances[k - 1] == pytest.approx(np.mean(counted), abs=1e-12)


def test_best_of_k_refuses_nan() -> None:
    with pytest.raises(ValueError, match="all numbers"):
        best_at_k([0.1, math.nan], [True, False])


def test_weighted_vote() -> None:
    assert weighted_vote(list("abb"), [True, False, False], [0.9, 0.4, 0.4]) == 1
    assert weighted_vote(list("abb"), [True, False, False], [0.7, 0.4, 0.4]) == 0
    assert weighted_vote(list("ab"), [True, False], [0.5, 0.5]) == 0.5
    assert weighted_vote([None, "b"], [False, True], [0.9, 0.1]) == 1, "a sample without an answer has no vote"
    assert weighted_vote([None], [False], [0.9]) == 0


def test_smallest_difference_is_detected_with_the_stated_power() -> None:
    """Differences of -1, 0 and 1 whose mean is exactly the detectable one: a z-test at 5 % detects it in about 80 %."""
    random = np.random.default_rng(0)
    pairs, share = 400, 0.3
    spread = np.array(
        [1.0] * int(pairs * share / 2) + [-1.0] * int(pairs * share / 2) + [0.0] * int(pairs * (1 - share))
    )
    detectable = smallest_difference(spread)
    assert detectable == pytest.approx((1.95996 + 0.84162) * math.sqrt(share) / math.sqrt(pairs), rel=0.03)
    up = (share + detectable) / 2
    samples = random.choice([1.0, -1.0, 0.0], p=[up, share - up, 1 - share], size=(4000, pairs))
    detected = np.abs(samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / math.sqrt(pairs))) > 1.96
    assert detected.mean() == pytest.approx(0.8, abs=0.03)
    assert 0 < smallest_difference(np.zeros(100)) < 0.05, "even if all pairs are equal, the sample is finite"


def test_wilson_interval_of_known_values() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson_interval(10, 10)[1] == 1
