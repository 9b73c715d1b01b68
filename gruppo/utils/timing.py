"""Seconds by phase."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the seconds of named phases, such as "generate" and "update"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block towards the phase. A block that raises counts nothing."""
        start = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return math.fsum(self.seconds.values())
