"""Statistics of evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22), by default at 95 %.

    (p̂ + z²/2n ± z·√(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n); both ends lie in [0, 1], also where p̂ is 0 or 1.
    No trials give (0, 1). Raises ValueError unless 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes = {successes} must lie between 0 and trials = {trials}")
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high


def bootstrap_interval(values: np.ndarray, share: float = 0.95, draws: int = 2_000) -> tuple[float, float]:
    """Interval that holds the mean of `values` with probability `share`: percentiles of the means of `draws` samples of
    the same size, drawn with replacement by a fixed seed. Raises ValueError for no values."""
    if not len(values):
        raise ValueError("values are empty; an interval needs at least one")
    random = np.random.default_rng(0)
    counts = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    low, high = np.quantile(counts @ values / len(values), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive's score is above a negative's, equal ones counted half; None where
    there are only positives or only negatives."""
    up, down = np.asarray(scores)[positive], np.sort(np.asarray(scores)[~positive])
    if not len(up) or not len(down):
        return None
    below = np.searchsorted(down, up, side="left") + np.searchsorted(down, up, side="right")
    return float(below.sum() / (2 * len(up) * len(down)))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (arXiv 1706.04599) over bins of equal width: Σ_b n_b/n |mean p - mean y|, from 0 to 1.
    Raises ValueError for no values."""
    if not len(probabilities):
        raise ValueError("probabilities are empty; a calibration error needs at least one")
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    apart = np.bincount(places, probabilities - labels, minlength=bins)
    return float(np.abs(apart).sum() / len(probabilities))


def trend(values: Sequence[float]) -> float:
    """The slope of a straight line through the values, in its standard errors; 0 where all are equal, infinite where
    they lie on a line that is not level. Raises ValueError for fewer than three."""
    if len(values) < 3:
        raise ValueError(f"{len(values)} values have no trend; give three or more")
    times = np.arange(len(values)) - (len(values) - 1) / 2
    made = np.asarray(values, dtype=float)
    slope = float(times @ made / (times @ times))
    residuals = made - made.mean() - slope * times
    error = math.sqrt(float(residuals @ residuals) / (len(values) - 2) / float(times @ times))
    if error <= 1e-12 * max(1.0, float(np.abs(made).max())):
        return 0.0 if abs(slope) <= 1e-12 else math.copysign(math.inf, slope)
    return slope / error
