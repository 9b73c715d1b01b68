"""Statistics of evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

MOST_VOTES = 1000  # maximum samples whose subsets can be counted in double precision


def wilson_interval(successes: float, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927, JASA 22), by default at 95 %.

    (p̂ + z²/2n ± z·√(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n); both ends lie in [0, 1], also if p̂ is 0 or 1.
    No trials give (0, 1). `successes` may be fractional. Raises ValueError unless 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes = {successes} must be between 0 and trials = {trials}")
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
    """Bootstrap interval of the mean of `values` with coverage `share`.

    Percentiles of the means of `draws` resamples of the same size, with replacement and a fixed seed. Raises ValueError
    if `values` is empty.
    """
    if not len(values):
        raise ValueError("values are empty; an interval needs at least one")
    means = _resamples(len(values), draws) @ values / len(values)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


@lru_cache(maxsize=1)  # the metrics of one evaluation have as many values
def _resamples(size: int, draws: int) -> np.ndarray:
    """How often each of `size` values is in each of `draws` resamples."""
    counts = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=draws)
    return counts.astype(np.min_scalar_type(counts.max()))


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: the probability that a positive scores higher than a negative, with ties counted half.

    `positive`: a boolean mask. None if there are only positives or only negatives.
    """
    up, down = np.asarray(scores)[positive], np.sort(np.asarray(scores)[~positive])
    if not len(up) or not len(down):
        return None
    below = np.searchsorted(down, up, side="left") + np.searchsorted(down, up, side="right")
    return float(below.sum() / (2 * len(up) * len(down)))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (arXiv 1706.04599) over bins of equal width: Σ_b n_b/n |mean p - mean y|, from 0 to 1.

    Raises ValueError if `probabilities` is empty.
    """
    if not len(probabilities):
        raise ValueError("probabilities are empty; a calibration error needs at least one")
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    differences = np.bincount(bin_of, probabilities - labels, minlength=bins)
    return float(np.abs(differences).sum() / len(probabilities))


def trend(values: Sequence[float]) -> float:
    """Slope of the least-squares line through the values, divided by its standard error.

    0 if all values are equal; infinite if they lie exactly on a line with nonzero slope. Raises ValueError for fewer
    than three values.
    """
    if len(values) < 3:
        raise ValueError(f"{len(values)} values are too few for a trend; pass at least three")
    times = np.arange(len(values)) - (len(values) - 1) / 2
    points = np.asarray(values, dtype=float)
    slope = float(times @ points / (times @ times))
    residuals = points - points.mean() - slope * times
    error = math.sqrt(float(residuals @ residuals) / (len(values) - 2) / float(times @ times))
    if error <= 1e-12 * max(1.0, float(np.abs(points).max())):
        return 0.0 if abs(slope) <= 1e-12 else math.copysign(math.inf, slope)
    return slope / error


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Unbiased estimator of pass@k, 1 - C(n-c, k)/C(n, k), for n samples of which c are correct.

    It is the probability that a random subset of k samples contains a correct one (Chen et al. 2021, arXiv 2107.03374,
    Eq. 1); k = 1 gives c/n. Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"right = {right}, samples = {samples}, k = {k}: must be 0 <= right <= samples, 1 <= k <= samples"
        )
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / number for number in range(samples - right + 1, samples + 1))


def majority_at_k(votes: Sequence[Hashable], right: Sequence[bool]) -> np.ndarray:
    """maj@k for k = 1…n: the expected correctness of the most common answer among k of the n samples.

    The expectation is over all subsets of k samples and computed exactly. If r answers tie, each counts 1/r.

    `votes`: the answer of each sample, equal for equal answers. None casts no vote; a subset without votes counts as
    incorrect. `right`: whether each sample is correct; if samples with the same answer differ, the answer counts with
    their mean. k = 1 is the accuracy. Raises ValueError for no samples, more than MOST_VOTES, or lists of different
    lengths.
    """
    if not 1 <= len(votes) <= MOST_VOTES or len(votes) != len(right):
        raise ValueError(f"{len(votes)} votes, {len(right)} verdicts: must be equally many, from 1 to 1,000")
    counts, correct = Counter(votes), Counter[Hashable]()
    for vote, verdict in zip(votes, right, strict=True):
        correct[vote] += bool(verdict)
    without_vote = counts.pop(None, 0)
    sizes = tuple(sorted(counts.values()))
    chances = np.zeros(len(votes))
    for vote, count in counts.items():
        if correct[vote]:
            chances += correct[vote] / count * _wins(count, sizes, without_vote)
    return chances


@lru_cache(maxsize=4096)
def _wins(size: int, sizes: tuple[int, ...], without_vote: int) -> np.ndarray:
    """Expected share of the vote, for k = 1…n, that an answer given by `size` samples wins.

    `sizes`: the number of samples of every answer, including this one. A subset of k samples with a of this answer
    counts if no other answer has more than a, with 1/(1+r) if r others have exactly a. table[r, s] counts the ways to
    take s samples of the other answers.
    """
    others = list(sizes)
    others.remove(size)
    total = sum(sizes) + without_vote
    whole = np.array([float(math.comb(total, k)) for k in range(total + 1)])
    won = np.zeros(total + 1)
    for a in range(1, size + 1):
        large = [other for other in others if other >= a]
        free = sum(other for other in others if other < a) + without_vote
        table = np.zeros((len(large) + 1, total + 1))
        table[0, : free + 1] = [float(math.comb(free, s)) for s in range(free + 1)]
        for other in large:
            extended = np.zeros_like(table)
            for taken in range(a):
                extended[:, taken:] += float(math.comb(other, taken)) * table[:, : total + 1 - taken]
            extended[1:, a:] += float(math.comb(other, a)) * table[:-1, : total + 1 - a]
            table = extended
        shared = (table / np.arange(1, len(large) + 2)[:, None]).sum(axis=0)
        won[a:] += float(math.comb(size, a)) * shared[: total + 1 - a]
    shares: np.ndarray = won[1:] / whole[1:]
    return shares


def best_at_k(scores: Sequence[float], right: Sequence[bool]) -> np.ndarray:
    """best-of-k for k = 1…n: the expected correctness of the highest-scored sample among k of the n samples.

    The expectation is over all subsets of k samples. Samples with equal scores share the choice. Raises ValueError for
    no samples, lists of different lengths, or a score that is NaN.
    """
    values, verdicts = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
    if not len(values) or len(values) != len(verdicts) or np.isnan(values).any():
        raise ValueError(
            f"{len(values)} scores, {len(verdicts)} verdicts: must be equally many, at least one, all numbers"
        )
    n, left = len(values), len(values)
    ks = range(1, n + 1)
    chances = np.zeros(n)
    for score in sorted(set(values.tolist()), reverse=True):
        tied = values == score
        rest = left - int(tied.sum())
        chosen = [(math.comb(left, k) - math.comb(rest, k)) / math.comb(n, k) for k in ks]
        chances += float(verdicts[tied].mean()) * np.array(chosen)
        left = rest
    return chances


def weighted_vote(votes: Sequence[Hashable], right: Sequence[bool], scores: Sequence[float]) -> float:
    """Correctness of the answer whose samples have the largest sum of scores; tied answers share the vote.

    A vote of None is ignored; without any vote the result is 0. Raises ValueError for lists of different lengths.
    """
    sums: dict[Hashable, float] = {}
    verdicts: dict[Hashable, list[bool]] = {}
    for vote, verdict, score in zip(votes, right, scores, strict=True):
        if vote is not None:
            sums[vote] = sums.get(vote, 0.0) + score
            verdicts.setdefault(vote, []).append(bool(verdict))
    best = max(sums.values(), default=0.0)
    winners = [sum(verdicts[vote]) / len(verdicts[vote]) for vote, total in sums.items() if total == best]
    return sum(winners) / len(winners) if winners else 0.0


def smallest_difference(differences: np.ndarray, power: float = 0.8, share: float = 0.95) -> float:
    """Smallest mean difference of pairs that a two-sided test at level 1 - `share` detects with probability `power`.

    It assumes equally many pairs with the same spread: (z_(1+share)/2 + z_power) · s/√n, by the normal approximation,
    at most 1. The standard deviation s includes two additional pairs with differences +1 and -1, so that pairs that
    never differ do not suggest that every difference would be detected. Raises ValueError for no pairs.
    """
    quantile = NormalDist().inv_cdf
    return min(1.0, (quantile((1 + share) / 2) + quantile(power)) * standard_error(differences))


def paired_interval(differences: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Interval of the mean difference of pairs, with differences from -1 to 1, by a bootstrap over pairs.

    If all differences are equal, no resample would show any variation; then the normal approximation is used, with the
    standard deviation of `smallest_difference`. Raises ValueError for no pairs.
    """
    if len(differences) and len(set(differences.tolist())) == 1:
        half = NormalDist().inv_cdf((1 + share) / 2) * standard_error(differences)
        middle = float(differences[0])
        return max(-1.0, middle - half), min(1.0, middle + half)
    return bootstrap_interval(differences, share)


def standard_error(differences: np.ndarray) -> float:
    """The standard error of the mean difference of pairs, with the standard deviation of `smallest_difference`.

    Raises ValueError for no pairs.
    """
    if not len(differences):
        raise ValueError("differences are empty; pass one per question")
    return float(np.std(np.append(differences, [1.0, -1.0]), ddof=1)) / math.sqrt(len(differences))
