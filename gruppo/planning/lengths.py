"""Completion lengths of a step: a distribution with a given mean, limited to max_tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

_HALVINGS = 60
_POINTS = 400  # quantiles that stand for all completions


def smallest(low: float, high: float, enough: Callable[[float], bool]) -> float:
    """The smallest number between `low` and `high` that is enough, by bisection; all larger ones must be, too."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Lengths:
    """Completion lengths at evenly spaced quantiles, shortest first.

    A logarithmic normal distribution, limited to the maximum: completions that would be longer are truncated there.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean length in tokens."""
        return math.fsum(self.values) / len(self.values)

    def mean_context(self, prompt: float) -> float:
        """Mean number of tokens before a token of a completion, averaged over all tokens: prompt + E[l²] / (2 E[l])."""
        return prompt + math.fsum(length**2 for length in self.values) / (2 * math.fsum(self.values))

    def training_context(self, prompt: float) -> float:
        """The same over all tokens of prompt and completion: E[(p + l)²] / (2 E[p + l])."""
        whole = [prompt + length for length in self.values]
        return math.fsum(length**2 for length in whole) / (2 * math.fsum(whole))


@lru_cache(maxsize=64)
def lengths_with_mean(mean: float, longest: float, spread: float) -> Lengths:
    """Lengths whose mean is `mean` and of which none is above `longest`; `spread` is σ of the logarithm.

    All are `longest` if the mean is.
    """
    if mean >= longest:
        return Lengths((float(longest),) * _POINTS)
    normal = NormalDist()
    scores = [normal.inv_cdf((index + 0.5) / _POINTS) for index in range(_POINTS)]

    def limited(center: float) -> Lengths:
        values = tuple(min(float(longest), math.exp(center + spread * score)) for score in scores)
        return Lengths(values)

    low, high = math.log(mean) - 10 * spread - spread**2, math.log(longest) + 10 * spread
    return limited(smallest(low, high, lambda center: limited(center).mean >= mean))
