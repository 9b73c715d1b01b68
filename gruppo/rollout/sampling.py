"""Single-turn sampling of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.types import Completion, Prompt
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


class Listener(Protocol):
    """Follows the completions of a step while they are sampled."""

    def add(self, place: int, completions: Sequence[Completion]) -> None:
        """Those of a prompt are there."""

    def turn(self) -> None:
        """Called again and again; may work for a moment, and raise."""


def sample_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    streams: Sequence[Sequence[tuple[int, ...]]],
    options: SamplingParams,
    progress: Progress,
    stop: Stop,
    label: str = "Sampling",
    listener: Listener | None = None,
) -> list[list[Completion]]:
    """Sample one completion per random stream for every prompt.

    The progress bar counts tokens; its total is the largest possible number of them. `listener`: gets the
    completions of each prompt as soon as all of them are there.
    """
    requests = [Request(prompt.token_ids, keys) for prompt, keys in zip(prompts, streams, strict=True)]
    total = sum(len(keys) for keys in streams) * options.max_tokens
    with progress.bar(label, total, "tokens") as show:

        def advance(tokens: float) -> None:
            stop.check()
            show(tokens)
            if listener is not None:
                listener.turn()

        if listener is not None:
            groups = dict[int, list[Completion]]()
            for place, completions in engine.stream(requests, options, advance):
                groups[place] = completions
                listener.add(place, completions)
            return [groups[place] for place in range(len(requests))]
        return engine.generate(requests, options, advance)
