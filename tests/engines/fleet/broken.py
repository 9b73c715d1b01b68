"""Engines that fail, by name: `engine.name = "tests.engines.fleet.broken:…"`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance


class Refuses(NativeEngine):
    def __init__(self, policy: LanguageModel, slots: int) -> None:
        raise UsageError("engine.memory = 1: too little")


class NeverStarts(NativeEngine):
    def __init__(self, policy: LanguageModel, slots: int) -> None:
        raise ImportError("no module named so")


class KeepsItsWeights(NativeEngine):
    """Loads the first weights and no others."""

    def load_weights(self, source: WeightSource, version: int) -> None:
        if version == 0:
            super().load_weights(source, version)
        self.version = version


class Exits(NativeEngine):
    """Ends its process when it samples for training."""

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        print("the driver of the device is not happy", file=sys.stderr, flush=True)
        os._exit(3)


class NeedsFewSlots(NativeEngine):
    """Runs out of memory with more than two slots."""

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        if self.slots > 2:
            raise MemoryError("out of memory: 3 slots")
        return super().stream(requests, params, advance)
