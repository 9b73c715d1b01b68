"""How well two rewards of the same completions agree: over all of them, and in the order within each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-9  # differences that are smaller, relative to the largest value, are rounding


@dataclass(frozen=True)
class Agreement:
    """Agreement of two lists of values.

    `count`: number of pairs. `equal`: share of the pairs whose values are equal. `means`: of the first and of the
    second list. `difference`: mean absolute difference. `pearson`, `spearman`: correlations of the values and of their
    ranks. `table`: only if all values are 0 or 1, the number of pairs with the values [[0 0, 0 1], [1 0, 1 1]]; `kappa`
    is then Cohen's kappa, (p_o - p_e) / (1 - p_e). Figures that are not defined are None: every one for an empty list,
    correlations if either list is constant, and kappa if all values of both lists are the same.
    """

    count: int
    equal: float | None = None
    means: tuple[float, float] | None = None
    difference: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    table: list[list[int]] | None = None
    kappa: float | None = None


def agreement(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Agreement:
    """The agreement of two lists of finite numbers, paired by place.

    Raises ValueError if the lists have different lengths, or contain a number that is not finite.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != other.shape or one.ndim != 1 or not np.isfinite(one).all() or not np.isfinite(other).all():
        raise ValueError(f"{one.shape} and {other.shape} values: must be two lists of equally many finite numbers")
    if not len(one):
        return Agreement(0)
    binary = bool(np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all())
    table = np.bincount((2 * one + other).astype(int), minlength=4).reshape(2, 2) if binary else None
    return Agreement(
        count=len(one),
        equal=float(are_equal(one, other).mean()),
        means=(_mean(one), _mean(other)),
        difference=_mean_difference(one, other),
        pearson=_correlation(one, other),
        spearman=_correlation(_ranks(one), _ranks(other)),
        table=None if table is None else table.tolist(),
        kappa=None if table is None else _kappa(table),
    )


def _mean(values: np.ndarray) -> float:
    """The mean, also of values whose sum overflows."""
    return float(_scaled(values).mean() * (np.abs(values).max() or 1.0))


def _mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """The mean absolute difference; the largest float if it overflows."""
    unit = float(max(np.abs(first).max(), np.abs(second).max())) or 1.0
    return min(float(np.abs(first / unit - second / unit).mean()) * unit, float(np.finfo(float).max))


def are_equal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether the values of each pair are equal, up to rounding; False where either is NaN."""
    unit = np.maximum(np.maximum(np.abs(first), np.abs(second)), np.finfo(float).tiny)
    close: np.ndarray = np.abs(first / unit - second / unit) <= TOLERANCE
    return close


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's correlation; None if either list is constant up to rounding."""
    (one, constant), (other, also) = ((_scaled(values), _constant(values)) for values in (first, second))
    if constant or also:
        return None
    one, other = one - one.mean(), other - other.mean()
    return float(np.clip(one @ other / np.sqrt((one @ one) * (other @ other)), -1.0, 1.0))


def _scaled(values: np.ndarray) -> np.ndarray:
    """The values divided by the largest absolute value, so that squares do not overflow."""
    return values / (np.abs(values).max() or 1.0)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(_scaled(values)) <= TOLERANCE)


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _kappa(table: np.ndarray) -> float | None:
    shares = table / table.sum()
    expected = float((shares.sum(axis=0) * shares.sum(axis=1)).sum())
    return None if expected == 1 else float((np.trace(shares) - expected) / (1 - expected))


@dataclass(frozen=True)
class RankingChanges:
    """How the order of the completions of each group changes from a first to a second reward; one entry per group.

    `pairs`: pairs of completions that have both rewards; `changed` of them compare differently (<, =, >); `ordered` are
    unequal in both rewards, and `swapped` of these are in the opposite order. `signs`: completions with both rewards
    whose advantage, the reward minus the mean of the group, has another sign (-, 0, +). `nonzero`: whether the group
    has nonzero advantages, by the first and by the second reward.
    """

    pairs: np.ndarray
    changed: np.ndarray
    ordered: np.ndarray
    swapped: np.ndarray
    signs: np.ndarray
    nonzero: tuple[np.ndarray, np.ndarray]


def ranking_changes(first: np.ndarray, second: np.ndarray) -> RankingChanges:
    """Compare two rewards of the completions of P groups of G; both arrays are [P, G].

    NaN: the reward of the completion is unknown. It is then left out of the mean of its group, as in training. Values
    that differ by rounding only, relative to the largest of the group, count as equal. Raises ValueError if the shapes
    differ.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"{first.shape} and {second.shape} rewards: must be two arrays [groups, completions]")
    (one, signs, nonzero), (other, others, also) = _by_group(first), _by_group(second)
    both = ~np.isnan(one) & ~np.isnan(other)
    pairs, changed, ordered, swapped = (np.zeros(len(one), dtype=int) for _ in range(4))
    for place in range(one.shape[1] - 1):
        known = both[:, place, None] & both[:, place + 1 :]
        before = _sign(one[:, place, None] - one[:, place + 1 :])
        after = _sign(other[:, place, None] - other[:, place + 1 :])
        pairs += known.sum(axis=1)
        changed += (known & (before != after)).sum(axis=1)
        ordered += (known & (before * after != 0)).sum(axis=1)
        swapped += (known & (before * after < 0)).sum(axis=1)
    different = (both & (signs != others)).sum(axis=1)
    return RankingChanges(pairs, changed, ordered, swapped, different, (nonzero, also))


def _by_group(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards [P, G] divided by the largest absolute value of their group, the signs of their advantages, and whether
    any advantage of a group is not 0."""
    known = ~np.isnan(rewards)
    unit = np.where(known, np.abs(rewards), 0.0).max(axis=1, initial=0.0, keepdims=True)
    scaled = rewards / np.where(unit > 0, unit, 1.0)
    mean = np.where(known, scaled, 0.0).sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    signs = _sign(scaled - mean)
    return scaled, signs, (known & (signs != 0)).any(axis=1)


def _sign(differences: np.ndarray) -> np.ndarray:
    """-1, 0 or 1; 0 also for NaN."""
    signs: np.ndarray = (differences > TOLERANCE).astype(np.int8) - (differences < -TOLERANCE).astype(np.int8)
    return signs
