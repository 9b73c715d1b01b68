"""Single-turn sampling of completions."""

from __future__ import annotations

from collections.abc import Sequence

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.types import Completion, Prompt
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


def sample_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    streams: Sequence[Sequence[tuple[int, ...]]],
    options: SamplingParams,
    progress: Progress,
    stop: Stop,
    label: str = "Sampling",
) -> list[list[Completion]]:
    """Sample one completion per random stream for every prompt.

    The progress bar counts tokens; its total is the largest possible number of them.
    """
    requests = [Request(prompt.token_ids, keys) for prompt, keys in zip(prompts, streams, strict=True)]
    total = sum(len(keys) for keys in streams) * options.max_tokens
    with progress.bar(label, total, "tokens") as show:

        def advance(tokens: float) -> None:
            stop.check()
            show(tokens)

        return engine.generate(requests, options, advance)
