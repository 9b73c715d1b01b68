"""The order in which prompts are sampled, from one task or from several by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gruppo.types import Prompt
from gruppo.utils.random_numbers import generator_of

T = TypeVar("T")


@dataclass(frozen=True)
class Mixture:
    """Prompts of one or several tasks. `weights`: sampling weight of every task, relative to the others."""

    parts: Sequence[Sequence[Prompt]]
    weights: Sequence[float]
    seed: int

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Prompt]:
        for part in self.parts:
            yield from part

    def draw(self, cursor: int, count: int) -> list[Prompt]:
        """Sample the `count` prompts that follow the first `cursor` samples: a task by weight, then its next prompt.

        A task's prompts are repeated epoch by epoch, in a new order in every epoch. The result depends only on the
        mixture and the arguments, so that a resumed run samples the same prompts as an uninterrupted one, whatever the
        batch sizes.
        """
        if len(self.parts) == 1:
            return draw_prompts(self.parts[0], self.seed, cursor, count)
        source = generator_of((self.seed, 2))
        borders = np.cumsum(self.weights) / np.sum(self.weights)
        chosen = np.searchsorted(borders[:-1], source.random(cursor + count), side="right")
        before = np.bincount(chosen[:cursor], minlength=len(self.parts))
        now = np.bincount(chosen[cursor:], minlength=len(self.parts))
        samples = [
            iter(draw_prompts(part, self.seed, int(start), int(size), stream))
            for stream, (part, start, size) in enumerate(zip(self.parts, before, now, strict=True))
        ]
        return [next(samples[task]) for task in chosen[cursor:]]


def draw_prompts(prompts: Sequence[Prompt], seed: int, cursor: int, count: int, stream: int = 0) -> list[Prompt]:
    """Sample the `count` prompts that follow the first `cursor` samples, epoch by epoch, in a new order in every epoch.

    A pure function of its arguments. `stream`: index of the task in a mixture, so that tasks get different orders; 0
    for a single task. `prompts` must not be empty.
    """
    samples: list[Prompt] = []
    while len(samples) < count:
        epoch, place = divmod(cursor + len(samples), len(prompts))
        entropy = (seed, 1, epoch, stream) if stream else (seed, 1, epoch)
        order = generator_of(entropy).permutation(len(prompts))
        samples += [prompts[index] for index in order[place : place + count - len(samples)]]
    return samples


def interleaved(parts: Sequence[Sequence[T]], most: int | None = None) -> list[T]:
    """Items of all parts in turn, at most `most` (default: all), so that the first few items cover all parts."""
    longest = max(map(len, parts), default=0)
    return [part[place] for place in range(longest) for part in parts if place < len(part)][:most]
