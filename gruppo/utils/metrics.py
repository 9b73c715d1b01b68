"""Metrics of a step: means, maxima and minima, reduced once at the end of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


# Name, value and count of each mean; name, value and choice of each extreme.
Observations = tuple[list[tuple[str, float, float]], list[tuple[str, float, Callable[..., float]]]]


class Metrics:
    """Named observations of a step, reduced once at its end.

    Means are kept as sums and counts, so the grouping of observations does not matter. An observed value is a number,
    or a scalar tensor, which stays on its device until `reduce`: all of them are then transferred at once.
    """

    def __init__(self) -> None:
        self._means: list[tuple[str, float | Tensor, float]] = []
        self._extremes: list[tuple[str, float | Tensor, Callable[..., float]]] = []

    def mean(self, name: str, total: float | Tensor, count: float = 1.0) -> None:
        """Add `total` over `count` observations; the reduced value is Σ total / Σ count."""
        self._means.append((name, total, count))

    def maximum(self, name: str, value: float | Tensor) -> None:
        """Keep the largest value observed."""
        self._extremes.append((name, value, max))

    def minimum(self, name: str, value: float | Tensor) -> None:
        """Keep the smallest value observed."""
        self._extremes.append((name, value, min))

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Discard the observations of the block if it raises."""
        means, extremes = len(self._means), len(self._extremes)
        try:
            yield
        except BaseException:
            del self._means[means:], self._extremes[extremes:]
            raise

    def observations(self) -> Observations:
        """The observations so far, with their values on the host."""
        values = iter(_on_host([observed for _, observed, _ in [*self._means, *self._extremes]]))
        means = [(name, next(values), count) for name, _, count in self._means]
        return means, [(name, next(values), choose) for name, _, choose in self._extremes]

    def add(self, observations: Observations) -> None:
        """Add observations that were made elsewhere."""
        means, extremes = observations
        self._means += means
        self._extremes += extremes

    def reduce(self) -> dict[str, float | None]:
        """Name -> value, sorted by name. Means of no observations and non-finite values are None."""
        means, observed = self.observations()
        sums: dict[str, tuple[float, float]] = {}
        for name, total, count in means:
            old_total, old_count = sums.get(name, (0.0, 0.0))
            sums[name] = (old_total + total, old_count + count)
        reduced = {name: (total / count if count else None) for name, (total, count) in sums.items()}
        extremes: dict[str, float] = {}
        for name, value, choose in observed:
            extremes[name] = choose(extremes.get(name, value), value)
        found = sorted({**reduced, **extremes}.items())
        return {name: value if value is not None and math.isfinite(value) else None for name, value in found}


def _on_host(observed: list[Any]) -> list[float]:
    """The observed numbers; tensors are transferred together. Without tensors, torch is not loaded."""
    tensors = [value for value in observed if hasattr(value, "detach")]
    if not tensors:
        return observed
    from gruppo.utils.transfer import as_floats

    numbers = iter(as_floats(tensors))
    return [next(numbers) if hasattr(value, "detach") else value for value in observed]
