"""An engine around another engine: the base class of engines that add something to every call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance


@dataclass
class EngineWrapper(Engine):
    """Hands every call on to `engine`."""

    engine: Engine

    @property
    def slots(self) -> int:
        """See `Engine`."""
        return self.engine.slots

    @slots.setter
    def slots(self, slots: int) -> None:
        self.engine.slots = slots

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`."""
        return self.engine.stream(requests, params, advance)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`."""
        self.engine.load_weights(source, version)

    def sleep(self) -> None:
        """See `Engine`."""
        self.engine.sleep()

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()
