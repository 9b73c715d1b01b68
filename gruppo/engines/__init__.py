"""Engines turn prompts into completions. Every engine passes the same contract tests (`tests/engines`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gruppo.models import LanguageModel
from gruppo.reporting import Advance
from gruppo.types import Completion


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete once for each of `streams`; a stream is the key of one completion's random numbers."""

    token_ids: tuple[int, ...]
    streams: Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """`temperature` 0 takes the likeliest token; a completion ends at `max_tokens` or with an end token."""

    temperature: float
    max_tokens: int


class Engine(Protocol):
    """Samples completions from the policy whose weights it was given last."""

    def generate(
        self, requests: Sequence[Request], options: SamplingOptions, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """For each request its completions, in the order of its streams.

        In float32 a completion depends on its prompt, its stream, the options and the weights, and on nothing else.
        `sampling_logprobs` are of the distribution that each token was drawn from; with temperature 0, of the
        distribution at temperature 1. `advance` is called with the number of tokens made since the last call.
        """

    def load_weights(self, policy: LanguageModel, version: int) -> None:
        """Sample from `policy` as it is now; completions carry `version`."""
