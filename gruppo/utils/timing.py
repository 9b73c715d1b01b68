"""Seconds per phase, and durations in words."""

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


def duration_text(seconds: float) -> str:
    """A duration in words of two units at most: "45 s", "12 min", "3 h 20 min", "4 d 2 h"."""
    if not math.isfinite(seconds):
        return "an unknown time"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    if hours < 36:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(days)} d {int(hours) % 24} h"
