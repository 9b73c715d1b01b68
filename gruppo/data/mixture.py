"""The order in which prompts are drawn, from one task or from several by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gruppo.types import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Mixture:
    """Prompts of one or several tasks. `weights`: how often each is drawn from, relative to the others."""

    parts: Sequence[Sequence[Prompt]]
    weights: Sequence[float]
    seed: int

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Prompt]:
        for part in self.parts:
            yield from part

    def draw(self, cursor: int, count: int) -> list[Prompt]:
        """The `count` prompts after the first `cursor` draws: a task by weight, then its next prompt.

        Each task goes epoch after epoch, each in an order of its own. A pure function of the mixture and its
        arguments, so that a resumed run draws what the uninterrupted one would have, in whatever batches.
        """
        if len(self.parts) == 1:
            return draw_prompts(self.parts[0], self.seed, cursor, count)
        source = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 2))))
        borders = np.cumsum(self.weights) / np.sum(self.weights)
        chosen = np.searchsorted(borders[:-1], source.random(cursor + count), side="right")
        before = np.bincount(chosen[:cursor], minlength=len(self.parts))
        now = np.bincount(chosen[cursor:], minlength=len(self.parts))
        drawn = [
            iter(draw_prompts(part, self.seed, int(start), int(many), stream))
            for stream, (part, start, many) in enumerate(zip(self.parts, before, now, strict=True))
        ]
        return [next(drawn[task]) for task in chosen[cursor:]]


def draw_prompts(prompts: Sequence[Prompt], seed: int, cursor: int, count: int, stream: int = 0) -> list[Prompt]:
    """The `count` prompts after the first `cursor` draws: epoch after epoch, each in an order of its own.

    A pure function of its arguments. `stream` tells the tasks of a mixture apart; 0 is that of a single task.
    """
    drawn: list[Prompt] = []
    while len(drawn) < count:
        epoch, place = divmod(cursor + len(drawn), len(prompts))
        entropy = (seed, 1, epoch, stream) if stream else (seed, 1, epoch)
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).permutation(len(prompts))
        drawn += [prompts[index] for index in order[place : place + count - len(drawn)]]
    return drawn


def interleaved(parts: Sequence[Sequence[T]], most: int | None = None) -> list[T]:
    """One of each part in turn, as long as there are any, `most` at the most: the first few hold all parts."""
    longest = max(map(len, parts), default=0)
    return [part[place] for place in range(longest) for part in parts if place < len(part)][:most]
