"""Statistics of evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

MOST_VOTES = 1000  # samples whose subsets can be counted in double precision


def wilson_interval(successes: float, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22), by default at 95 %.

    (p̂ + z²/2n ± z·√(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n); both ends lie in [0, 1], also where p̂ is 0 or 1.
    No trials give (0, 1); successes may count in part. Raises ValueError unless 0 <= successes <= trials.
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


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that a subset of k of the samples holds a right one: 1 - C(n-c, k)/C(n, k), the unbiased estimator of
    pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1), n samples of which c are right.

    k = 1 gives c/n. Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"right = {right}, samples = {samples}, k = {k}: must be 0 <= right <= samples, 1 <= k <= samples"
        )
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / number for number in range(samples - right + 1, samples + 1))


def majority_at_k(votes: Sequence[Hashable], right: Sequence[bool]) -> np.ndarray:
    """maj@k for k = 1…n: how often the commonest answer among k of the n samples is right, in expectation over all
    subsets of k samples, computed exactly. Answers that tie share the vote: with r of them, each counts 1/r.

    `votes`: what each sample answers, equal for equal answers; None casts no vote, and where nobody votes nothing is
    right. `right`: whether a sample is right; an answer whose samples differ in that counts with their mean. k = 1 is
    the accuracy. Raises ValueError for no samples, more than MOST_VOTES, or lists of different lengths.
    """
    if not 1 <= len(votes) <= MOST_VOTES or len(votes) != len(right):
        raise ValueError(f"{len(votes)} votes, {len(right)} verdicts: must be as many, from 1 to 1,000")
    counts, credited = Counter(votes), Counter[Hashable]()
    for vote, verdict in zip(votes, right, strict=True):
        credited[vote] += bool(verdict)
    abstained = counts.pop(None, 0)
    sizes = tuple(sorted(counts.values()))
    chances = np.zeros(len(votes))
    for vote, count in counts.items():
        if credited[vote]:
            chances += credited[vote] / count * _wins(count, sizes, abstained)
    return chances


@lru_cache(maxsize=4096)
def _wins(own: int, sizes: tuple[int, ...], abstained: int) -> np.ndarray:
    """For k = 1…n the expected share of the vote that a class of `own` samples wins: one of `sizes`, the class sizes.

    Of the subsets of k samples with a of the class, those count in which no other class has more than a, by 1/(1+r)
    where r others have a too. table[r, s] counts the ways to take s samples of the other classes.
    """
    others = list(sizes)
    others.remove(own)
    total = sum(sizes) + abstained
    whole = np.array([float(math.comb(total, k)) for k in range(total + 1)])
    won = np.zeros(total + 1)
    for a in range(1, own + 1):
        large = [size for size in others if size >= a]
        free = sum(size for size in others if size < a) + abstained
        table = np.zeros((len(large) + 1, total + 1))
        table[0, : free + 1] = [float(math.comb(free, s)) for s in range(free + 1)]
        for size in large:
            made = np.zeros_like(table)
            for taken in range(a):
                made[:, taken:] += float(math.comb(size, taken)) * table[:, : total + 1 - taken]
            made[1:, a:] += float(math.comb(size, a)) * table[:-1, : total + 1 - a]
            table = made
        shared = (table / np.arange(1, len(large) + 2)[:, None]).sum(axis=0)
        won[a:] += float(math.comb(own, a)) * shared[: total + 1 - a]
    shares: np.ndarray = won[1:] / whole[1:]
    return shares


def best_at_k(scores: Sequence[float], right: Sequence[bool]) -> np.ndarray:
    """best-of-k for k = 1…n: how often the sample with the highest score among k of the n samples is right, in
    expectation over all subsets of k samples. Samples of equal score share the choice.

    Raises ValueError for no samples, lists of different lengths, and a score that is not a number.
    """
    given, verdicts = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
    if not len(given) or len(given) != len(verdicts) or np.isnan(given).any():
        raise ValueError(f"{len(given)} scores, {len(verdicts)} verdicts: must be as many, at least one, all numbers")
    n, left = len(given), len(given)
    ks = range(1, n + 1)
    chances = np.zeros(n)
    for score in sorted(set(given.tolist()), reverse=True):
        tied = given == score
        rest = left - int(tied.sum())
        chosen = [(math.comb(left, k) - math.comb(rest, k)) / math.comb(n, k) for k in ks]
        chances += float(verdicts[tied].mean()) * np.array(chosen)
        left = rest
    return chances


def weighted_vote(votes: Sequence[Hashable], right: Sequence[bool], scores: Sequence[float]) -> float:
    """How right the answer is whose samples' scores have the largest sum; answers that tie share. None casts no vote,
    and where nobody votes nothing is right. Raises ValueError for lists of different lengths."""
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
    """The smallest mean difference of pairs that a two-sided test at 1 - `share` would find with probability `power`,
    with as many pairs of the same spread: (z_(1+share)/2 + z_power) · s/√n, by the normal approximation.

    s is taken over the differences and one pair more each way (+1 and -1), so that pairs that never differ do not
    promise that every difference would be seen. At most 1. Raises ValueError for no pairs.
    """
    quantile = NormalDist().inv_cdf
    return min(1.0, (quantile((1 + share) / 2) + quantile(power)) * _standard_error(differences))


def paired_interval(differences: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of pairs' differences, each from -1 to 1: a bootstrap over pairs; where all are equal, which
    no draw would show to be chance, by the normal approximation with the spread that `smallest_difference` takes.
    Raises ValueError for no pairs."""
    if len(differences) and len(set(differences.tolist())) == 1:
        half = NormalDist().inv_cdf((1 + share) / 2) * _standard_error(differences)
        middle = float(differences[0])
        return max(-1.0, middle - half), min(1.0, middle + half)
    return bootstrap_interval(differences, share)


def _standard_error(differences: np.ndarray) -> float:
    if not len(differences):
        raise ValueError("differences are empty; give one a question")
    return float(np.std(np.append(differences, [1.0, -1.0]), ddof=1)) / math.sqrt(len(differences))
