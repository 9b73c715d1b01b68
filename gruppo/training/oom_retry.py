"""The sizes of a run that follow from memory, and what happens to them when an allocation fails after all.

What failed is done again from its beginning with half the size, which is kept for the rest of the run. No result
depends on a size but by rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from gruppo.engines.base import Request, SamplingOptions
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.models.policy import LanguageModel
from gruppo.types import Completion
from gruppo.utils.progress import Advance
from gruppo.utils.system import release_memory

Made = TypeVar("Made")
NAMES = {"micro_batch_tokens": "micro-batch", "slots": "completions in flight"}


@dataclass(frozen=True)
class Halving:
    """A size that became smaller: which one of `Sizes`, what was being done, and what the allocator said."""

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
class Sizes:
    """`micro_batch_tokens`: of a micro-batch at the most; `slots`: completions in flight. `least`: tokens of the
    longest prompt with its longest completion, below which a micro-batch cannot become smaller. `told`: called with
    each change, once it is made."""

    micro_batch_tokens: int
    slots: int
    least: int = 1
    told: Callable[[Halving], None] = lambda _: None

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
            self._halve(size, during, why)

    def _halve(self, size: str, during: str, why: str) -> None:
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
        self.told(Halving(size, before, getattr(self, size), during, why))


@dataclass
class FittingEngine:
    """An engine whose completions in flight become fewer where memory runs out. In float32 no completion changes."""

    engine: NativeEngine
    sizes: Sizes

    def generate(
        self, requests: Sequence[Request], options: SamplingOptions, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """See `Engine`."""

        def attempt(slots: int) -> list[list[Completion]]:
            self.engine.slots = slots
            return self.engine.generate(requests, options, advance)

        return self.sizes.fitting("slots", "sampling", attempt)

    def load_weights(self, policy: LanguageModel, version: int) -> None:
        """See `Engine`."""
        self.engine.load_weights(policy, version)
