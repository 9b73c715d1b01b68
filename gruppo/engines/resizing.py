"""An engine wrapper that reduces the number of slots when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.wrapper import EngineWrapper
from gruppo.errors import first_line, out_of_memory
from gruppo.types import Completion
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Advance


@dataclass
class ResizingEngine(EngineWrapper):
    """Retries sampling with fewer slots when it runs out of memory.

    In float32 this changes no completion. Finished groups are kept; the others are sampled again from the start.
    """

    sizes: BatchSizes

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`."""
        left = dict(enumerate(requests))
        while left:
            indices, why = list(left), None
            self.engine.slots = self.sizes.slots
            try:
                for place, completions in self.engine.stream([left[index] for index in indices], params, advance):
                    del left[indices[place]]
                    yield indices[place], completions
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                why = first_line(error)
            # Not in the except clause: there the error still keeps the frames of the failed attempt, and their tensors.
            if why is not None:
                self.sizes.reduce("slots", "sampling", why)
