"""Random numbers that are a pure function of a key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def generator_of(key: Sequence[int]) -> np.random.Generator:
    """A generator (Philox) whose numbers depend on nothing but the key. Keys with different entries are independent."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
