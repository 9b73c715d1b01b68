"""TODO."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.utils.system import release_memory

Made = TypeVar("Made")


NAMES = {"micro_batch_tokens": "micro-batch", "slots": "completions in flight"}


@dataclass(frozen=True)
class SizeReduced:
    """A size that became smaller: which one of `BatchSizes`, what was being done, and what the allocator said."""

    size: str
    before: int
    after: int
    during: str
    why: str

    def __str__(self) -> str:
        unit = " tokens" if self.size == "micro_batch_tokens" else ""
        return (
            f"memory ran out while {self.during} ({self.why}): done again from its beginning, and from here on the "
            f"{NAMES[self.size]} is {self.after}{unit} instead of {self.before}; results differ by rounding"
        )


@dataclass
class BatchSizes:
    """`micro_batch_tokens`: of a micro-batch at the most; `slots`: completions in flight. `least`: tokens of the
    longest prompt with its longest completion, below which a micro-batch cannot become smaller. `told`: called with
    each change, once it is made."""

    micro_batch_tokens: int
    slots: int
    least: int = 1
    told: Callable[[SizeReduced], None] = lambda _: None

    def fitting(self, size: str, during: str, attempt: Callable[[int], Made]) -> Made:
        """What `attempt` makes with the size of that name, which is halved for as long as memory runs out. An attempt
        begins from the beginning each time. Raises RunError where the size is at its smallest."""
        while True:
            try:
                return attempt(getattr(self, size))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                why = first_line(error)
            # Outside of the clause above, as the error holds the frames, and they the tensors, of the attempt.
            self.reduce(size, during, why)

    def reduce(self, size: str, during: str, why: str) -> None:
        """Halve a size, free memory, and report it. Raises RunError where the size is at its smallest."""
        before, least = getattr(self, size), self.least if size == "micro_batch_tokens" else 1
        if before <= least:
            raise RunError(
                f"memory ran out while {during} ({why}), and the {NAMES[size]} is at its smallest ({before}): the last "
                "checkpoint is intact; begin again with a smaller sampling.max_tokens or model, or free some memory "
                "and resume"
            )
        gc.collect()
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        setattr(self, size, max(least, before // 2))
        self.told(SizeReduced(size, before, getattr(self, size), during, why))
