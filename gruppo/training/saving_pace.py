"""How often a training is saved whose updates may be quicker than a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.1  # of the time that checkpoints may take
FIRST_RATE = 100e6  # bytes per second at which the first checkpoint is taken to be written: a slow disk


class SavingPace:
    """Lets checkpoints take at most a tenth of the time of a training.

    What is computed does not depend on it, only how much a kill loses: at most what ten times the time of a checkpoint
    has computed, and the updates to the next one that is due. `clock`: seconds.
    """

    def __init__(self, checkpoint_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`checkpoint_bytes`: of one checkpoint. The time of the training begins now."""
        self.clock, self.start, self.spent = clock, clock(), 0.0
        self.next = checkpoint_bytes / FIRST_RATE  # seconds that the next checkpoint is taken to need

    @property
    def allows(self) -> bool:
        """Whether a checkpoint now would keep the time of all checkpoints within the share."""
        return self.spent + self.next <= SHARE * (self.clock() - self.start + self.next)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the checkpoint that the block saves."""
        begun = self.clock()
        yield
        self.next = self.clock() - begun
        self.spent += self.next
