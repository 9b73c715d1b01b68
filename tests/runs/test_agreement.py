"""Figures of agreement against numbers worked out by hand, and rankings against a comparison pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from gruppo.runs.agreement import agreement, are_equal, ranking_changes

NAN = float("nan")


def test_correlations_by_hand() -> None:
    """Ranks with ties: (1, 2.5, 2.5, 4) and (1, 3, 2, 4). Spearman's ρ is their Pearson correlation."""
    found = agreement([1, 2, 2, 9], [0, 2, 1, 3])
    assert found.spearman == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert found.pearson == pytest.approx(12 / np.sqrt(41 * 5))
    assert (found.count, found.equal, found.means) == (4, 0.25, (3.5, 1.5))
    assert found.difference == pytest.approx((1 + 0 + 1 + 6) / 4)
    assert (found.table, found.kappa) == (None, None)


def test_kappa_by_hand() -> None:
    """20 + 15 of 50 agree: p_o = 0.7, p_e = 0.6 · 0.5 + 0.4 · 0.5 = 0.5, κ = 0.4."""
    pairs = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    found = agreement(*zip(*pairs, strict=True))
    assert found.table == [[15, 10], [5, 20]]
    assert found.kappa == pytest.approx(0.4)
    assert found.equal == pytest.approx(0.7)


def test_figures_that_are_not_defined_are_none() -> None:
    assert agreement([], []).equal is None
    same = agreement([1, 1], [1, 1])
    assert (same.equal, same.kappa, same.pearson, same.spearman) == (1.0, None, None, None)
    constant = agreement([0, 1], [1, 1])
    assert (constant.kappa, constant.pearson) == (0.0, None)
    assert agreement([0.3, 0.1 + 0.2], [1, 2]).pearson is None, "constant up to rounding"
    for first, second in (([1], [1, 2]), ([NAN], [1.0]), ([1.0], [float("inf")])):
        with pytest.raises(ValueError, match="equally many finite numbers"):
            agreement(first, second)


def test_huge_and_tiny_values() -> None:
    for unit in (1e308, 1e-300):
        found = agreement([unit, -unit, unit], [-unit, unit, -unit])
        assert found.pearson == pytest.approx(-1.0)
        assert found.means[0] == pytest.approx(unit / 3)
        assert found.difference == pytest.approx(min(2 * unit, 1.797e308), rel=0.01)
    assert list(are_equal(np.array([0.1 + 0.2, 0.0, NAN]), np.array([0.3, 1e-30, NAN]))) == [True, False, False]


def test_ranking_changes_by_hand() -> None:
    first = np.array([[0, 1, 2, 2], [1, 1, 1, 1], [0, 1, NAN, 5], [0.3, 0.1 + 0.2, NAN, NAN]])
    second = np.array([[2, 1, 0, 0], [0, 0, 0, 1], [1, 0, 9, NAN], [1, 1, 1, 1]])
    found = ranking_changes(first, second)
    assert found.pairs.tolist() == [6, 6, 1, 1]
    assert found.changed.tolist() == [5, 3, 1, 0]
    assert found.ordered.tolist() == [5, 0, 1, 0]
    assert found.swapped.tolist() == [5, 0, 1, 0]
    assert [values.tolist() for values in found.nonzero] == [[True, False, True, False], [True, True, True, False]]
    assert found.signs.tolist() == [4, 4, 0, 0], "means 1.25, 0.75; 1, 0.25; 2 of 3 and 10/3 of 3; equal"


def test_ranking_changes_pair_by_pair() -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 3, (50, 6)).astype(float) for _ in range(2))
    for rewards in (first, second):
        rewards[random.random(rewards.shape) < 0.2] = NAN
    found = ranking_changes(first * 8e307, second * 1e-9)
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        known = ~np.isnan(one) & ~np.isnan(other)
        before, after = (
            [np.sign(x[j] - x[i]) for i, j in combinations(np.flatnonzero(known), 2)] for x in (one, other)
        )
        both = list(zip(before, after, strict=True))
        assert found.pairs[row] == len(both)
        assert found.changed[row] == sum(a != b for a, b in both)
        assert found.ordered[row] == sum(a * b != 0 for a, b in both)
        assert found.swapped[row] == sum(a * b < 0 for a, b in both)
        signs = [np.sign(np.round(x - np.nanmean(x), 9)) for x in (one, other)]
        assert found.signs[row] == sum(signs[0][known] != signs[1][known])
        for rewards, nonzero in zip((one, other), found.nonzero, strict=True):
            assert nonzero[row] == (len(set(rewards[~np.isnan(rewards)])) > 1)


def test_groups_of_one_and_no_groups() -> None:
    one = ranking_changes(np.array([[1.0]]), np.array([[NAN]]))
    assert (one.pairs.tolist(), one.nonzero[0].tolist()) == ([0], [False])
    assert len(ranking_changes(np.zeros((0, 4)), np.zeros((0, 4))).pairs) == 0
    with pytest.raises(ValueError, match="two arrays"):
        ranking_changes(np.zeros((1, 2)), np.zeros((1, 3)))
