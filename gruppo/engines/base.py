"""Interface of engines. Every engine passes the same contract tests (`tests/engines`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with one completion to sample per entry of `streams`.

    A stream is the key of the random numbers of one completion. `limits`: the maximum number of tokens of each
    completion, if it is smaller than `SamplingParams.max_tokens`. A completion that reaches its limit has the finish
    reason "length". `written`: the number of tokens at the end of `token_ids` that the model wrote before. A stop
    string may begin in them, and the text of a completion begins with theirs.

    `shared`: the number of tokens at the start of `token_ids` that other requests begin with as well, by default all.
    `keep`: whether a later request may begin with `token_ids` and a completion of this request; `continues`: whether
    this request begins with those of an earlier one that said so. An engine may use all three to compute less; they
    change results by rounding at most.
    """

    token_ids: tuple[int, ...]
    streams: Sequence[tuple[int, ...]]
    limits: Sequence[int] | None = None
    written: int = 0
    shared: int | None = None
    keep: bool = False
    continues: bool = False

    def limit(self, number: int, params: SamplingParams) -> int:
        """The maximum number of tokens of the completion of stream `number`."""
        return params.max_tokens if self.limits is None else min(params.max_tokens, self.limits[number])


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The distribution that tokens are sampled from, and the conditions that end a completion.

    `temperature` divides the logits; 0 always takes the most likely token. The truncations then apply in this order,
    each to the result of the one before: `top_k` keeps the k most likely tokens (0 keeps all; ties at the border are
    kept), `top_p` the fewest most likely tokens whose probabilities sum to at least top_p, and `min_p` the tokens whose
    probability is at least min_p times that of the most likely token.

    A completion ends with an EOS token, at the first text of `stop`, or after `max_tokens` tokens. It never ends before
    `min_tokens` tokens; until then EOS tokens have probability 0. The tokens of a stop string are kept. Its text is
    removed, or with `keep_stop` kept; what follows it in its last token is removed in both cases.

    Training samples from the full distribution.
    """

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    keep_stop: bool = False


class Engine(Protocol):
    """Samples completions from the policy with the weights that were loaded last."""

    slots: int
    """Number of concurrent completions. It changes completions by rounding at most."""

    copies_weights: bool = True
    """Whether the engine keeps weights of its own. Each load is then probed; see `gruppo.engines.probe`."""

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield the index of each request and its completions, in the order of its streams.

        A request is yielded as soon as all of its completions are finished, so groups of short completions come first.

        In float32 a completion depends only on its prompt, stream, parameters and weights. It has the version of the
        weights that sampled it. `sampling_logprobs` are log-probabilities (nats) under the distribution that each token
        was sampled from, truncated or not; with temperature 0, under the full distribution at temperature 1. `advance`
        is called with the number of tokens sampled since its last call.

        Raises ValueError for a prompt without tokens, unless `limits` has one positive value per stream, and if more
        tokens are `written`, or `shared`, than there are, or none is shared.
        """

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """The completions of every request, in order. See `stream`."""
        finished = dict(self.stream(requests, params, advance))
        return [finished[index] for index in range(len(requests))]

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Use these weights for sampling from now on. Completions get the version `version`."""

    def sleep(self) -> None:
        """Free the memory of the device that only sampling needs, until the next call of another method."""

    def close(self) -> None:
        """End the processes of the engine."""
