"""Seconds per phase."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Total seconds per named phase, such as "generate" and "update"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to the phase. A block that raises is not counted."""
        start = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    @property
    def total(self) -> float:
        """Total seconds of all phases."""
        return math.fsum(self.seconds.values())
