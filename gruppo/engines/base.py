"""Engines turn prompts into completions. Every engine passes the same contract tests (`tests/engines`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete once for each of `streams`; a stream is the key of one completion's random numbers.

    `limits`: the most tokens of each completion, where that is fewer than `SamplingParams.max_tokens`. A completion
    that reaches its limit has the finish reason "length".
    """

    token_ids: tuple[int, ...]
    streams: Sequence[tuple[int, ...]]
    limits: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The distribution that tokens are sampled from, and where a completion ends.

    `temperature` divides the logits; 0 takes the likeliest token. Then, each on what the one before left: `top_k`
    keeps the k likeliest tokens (0: all; equal ones at the border stay), `top_p` the likeliest that together have this
    probability, `min_p` those with this share of the likeliest one's. A completion ends with an end token, before the
    first text of `stop` (its tokens are kept, its text is not), or after `max_tokens`; never before `min_tokens`,
    until which end tokens have probability 0. Training takes the full distribution; its only stops are where an
    environment takes over.
    """

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()


class Engine(Protocol):
    """Samples completions from the policy whose weights it was given last."""

    slots: int
    """How many completions are sampled at a time. No completion depends on it but by rounding."""

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The index of each request with its completions, in the order of its streams, as soon as all of them are
        finished: shorter groups come first.

        In float32 a completion depends on its prompt, its stream, the parameters and the weights, and on nothing else.
        It carries the version of the weights that sampled it. `sampling_logprobs` are of the distribution that each
        token was sampled from, truncated or not; with temperature 0, of the full distribution at temperature 1.
        `advance` is called with the number of tokens sampled since its last call. Raises ValueError for a prompt
        without tokens, and unless `limits` has one positive value per stream.
        """

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """The completions of every request, in order; see `stream`."""
        finished = dict(self.stream(requests, params, advance))
        return [finished[index] for index in range(len(requests))]

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Sample with these weights from now on; completions carry `version`."""
