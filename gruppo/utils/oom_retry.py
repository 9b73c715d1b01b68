"""Retry with a smaller batch size when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.utils.system import release_memory

Result = TypeVar("Result")


_UNITS = {"micro_batch_tokens": "micro-batch tokens", "slots": "slots"}


@dataclass(frozen=True)
class SizeReduced:
    """A reduction of a batch size after an out-of-memory error.

    `size`: the field of BatchSizes. `during`: the phase in which memory ran out, e.g. "sampling". `why`: the message of
    the allocator.
    """

    size: str
    before: int
    after: int
    during: str
    why: str

    def __str__(self) -> str:
        return (
            f"out of memory during {self.during} ({self.why}): retried from its start with {self.after} "
            f"{_UNITS[self.size]} (was {self.before}), kept for the rest of the run; results differ by rounding"
        )


@dataclass
class BatchSizes:
    """Batch sizes that are reduced when memory runs out.

    `micro_batch_tokens`: maximum tokens per micro-batch. `slots`: concurrent completions. `least`: lower limit of
    micro_batch_tokens, the tokens of the longest prompt with its longest completion. `on_reduced`: called with every
    reduction, after it has taken effect. `retries`: False if other processes take part in what runs out of memory, and
    would wait forever; the run then ends, and resumes with the smaller size.
    """

    micro_batch_tokens: int
    slots: int
    least: int = 1
    on_reduced: Callable[[SizeReduced], None] = lambda _: None
    retries: bool = True

    def run_with_retry(self, size: str, during: str, attempt: Callable[[int], Result]) -> Result:
        """Call `attempt` with the size of that name, and halve the size until memory suffices.

        Every attempt must start from the beginning. Raises RunError if memory runs out at the smallest size.
        """
        while True:
            try:
                return attempt(getattr(self, size))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                why = first_line(error)
            # Outside the except clause, because the error references the frames and thus the tensors of the attempt.
            self.reduce(size, during, why)
            if not self.retries:
                raise RunError(
                    f"out of memory during {during} ({why}); resume the run, and it continues with "
                    f"{getattr(self, size)} {_UNITS[size]}"
                )

    def reduce(self, size: str, during: str, why: str) -> None:
        """Halve a size, release memory and report the change. Raises RunError if the size is already at its minimum."""
        before, least = getattr(self, size), self.least if size == "micro_batch_tokens" else 1
        if before <= least:
            raise RunError(
                f"out of memory during {during} ({why}), with {_UNITS[size]} already at the minimum ({before}): the "
                "last checkpoint is intact; start again with a smaller sampling.max_tokens or model, or free some "
                "memory and resume"
            )
        gc.collect()
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        setattr(self, size, max(least, before // 2))
        self.on_reduced(SizeReduced(size, before, getattr(self, size), during, why))
