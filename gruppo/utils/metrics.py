"""Metrics of a step: means, maxima and minima, reduced once at the end of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager


class Metrics:
    """Named observations of a step, reduced once at its end.

    Means are kept as sums and counts, so the order and grouping of observations does not matter.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._extremes: dict[str, float] = {}

    def mean(self, name: str, total: float, count: float = 1.0) -> None:
        """Add `total` over `count` observations; the reduced value is Σ total / Σ count."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def maximum(self, name: str, value: float) -> None:
        """Keep the largest value observed."""
        old = self._extremes.get(name, value)
        self._extremes[name] = max(old, value)

    def minimum(self, name: str, value: float) -> None:
        """Keep the smallest value observed."""
        old = self._extremes.get(name, value)
        self._extremes[name] = min(old, value)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Discard the observations of the block if it raises."""
        before = dict(self._sums), dict(self._extremes)
        try:
            yield
        except BaseException:
            self._sums, self._extremes = before
            raise

    def reduce(self) -> dict[str, float | None]:
        """Name -> value, sorted by name. Means of no observations and non-finite values are None."""
        means = {name: (total / count if count else None) for name, (total, count) in self._sums.items()}
        values = sorted({**means, **self._extremes}.items())
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values}
