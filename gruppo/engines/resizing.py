"""An engine that samples with fewer slots after it ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.errors import first_line, out_of_memory
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Advance


@dataclass
class ResizingEngine(Engine):
    """Any engine with slots, which become fewer where memory runs out. In float32 no completion changes by that.

    Groups that are finished stay; the others are sampled again from their beginning.
    """

    engine: Engine
    sizes: BatchSizes

    @property
    def slots(self) -> int:  # type: ignore[override]
        """See `Engine`."""
        return self.sizes.slots

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
            # Outside of the clause above, as the error holds the frames, and they the tensors, of the attempt.
            if why is not None:
                self.sizes.reduce("slots", "sampling", why)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`."""
        self.engine.load_weights(source, version)
