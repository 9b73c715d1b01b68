"""The native engine, which notes when it would take memory of the device as vLLM does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar

import pytest

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance

NAME = f"{__name__}:Watched"


class Watched(NativeEngine):
    """`awake`: the engines that are awake, by id."""

    awake: ClassVar[set[int]] = set()

    def __init__(self, policy: LanguageModel, slots: int) -> None:
        assert not self.awake, "the memory is taken"
        super().__init__(policy, slots)
        self.awake.add(id(self))

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.awake.add(id(self))
        return super().stream(requests, params, advance)

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> list[list[Completion]]:
        return [completions for _, completions in sorted(self.stream(requests, params, advance))]

    def load_weights(self, source: WeightSource, version: int) -> None:
        self.awake.add(id(self))
        super().load_weights(source, version)

    def sleep(self) -> None:
        self.awake.discard(id(self))

    def close(self) -> None:
        self.awake.discard(id(self))


def watch(monkeypatch: pytest.MonkeyPatch, *targets: str) -> list[int]:
    """How many engines are awake at each later call of the functions `targets`."""
    monkeypatch.setattr(Watched, "awake", set())
    counts: list[int] = []

    def counted(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        counts.append(len(Watched.awake))
        return original(*arguments, **named)

    for target in targets:
        original = resolve_name(target)
        monkeypatch.setattr(target, lambda *a, original=original, **k: counted(original, *a, **k))
    return counts
