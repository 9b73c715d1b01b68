"""An engine that samples from a GGUF file with llama.cpp: the logits are llama.cpp's, the choice of tokens is gruppo's.

It verifies exported files. It samples one completion after another.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import CompletionText, check_requests, make_completion
from gruppo.engines.native.sampling import sample_tokens
from gruppo.engines.stop_strings import StopFinder
from gruppo.errors import UsageError
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.imports import installed
from gruppo.utils.progress import Advance
from gruppo.utils.random_numbers import generator_of


def llama_cpp_installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return installed("llama_cpp")


@contextmanager
def _weights_as_in_the_file(bindings: Any) -> Iterator[None]:
    """llama.cpp keeps weights as they are in the file, where it would rearrange them for the processor, for speed.

    Rearranged q8_0 weights end the process on processors with AMX (llama-cpp-python 0.3.36). `Llama` has no argument
    for this, so the default that it asks its bindings for is another one inside the block.
    """
    default = bindings.llama_model_default_params

    def changed() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    bindings.llama_model_default_params = changed
    try:
        yield
    finally:
        bindings.llama_model_default_params = default


class LlamaCppEngine(Engine):
    """See `Engine`. `eos_ids`: the tokens that end a turn for llama.cpp."""

    slots = 1

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        """Load a GGUF file. `context`: the maximum number of tokens of a prompt with its completion.

        Raises UsageError if llama.cpp cannot load it.
        """
        try:
            self._library: Any = importlib.import_module("llama_cpp")
            threads = torch.get_num_threads()
            with _weights_as_in_the_file(self._library.llama_cpp):
                self._llama: Any = self._library.Llama(
                    str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
                )
        except Exception as error:  # a third-party library can fail in any way
            raise UsageError(f"{path}: llama.cpp cannot load it ({error})") from error
        vocabulary = self._library.llama_model_get_vocab(self._llama.model)
        self._size = int(self._llama.n_vocab())
        self.eos_ids = tuple(
            token for token in range(self._size) if self._library.llama_vocab_is_eog(vocabulary, token)
        )
        self._text = CompletionText(tokenizer, self.eos_ids)

    def tokens_of(self, text: str) -> list[int]:
        """The token ids of a text, special tokens in it included, without BOS before it."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=True)
        return ids

    def load_weights(self, source: WeightSource, version: int) -> None:
        """The weights are those of the file."""
        raise NotImplementedError("the weights of a GGUF file cannot be replaced")

    def sleep(self) -> None:
        """See `Engine`. The memory of weights and keys is kept."""

    def close(self) -> None:
        """See `Engine`. Frees the memory; there are no processes."""
        self._llama.close()

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`."""
        check_requests(requests)
        for index, request in enumerate(requests):
            completions = []
            first = self._logits(0, request.token_ids) if request.streams else None
            for number, stream in enumerate(request.streams):
                assert first is not None
                limit = request.limit(number, params)
                completions.append(self._completion(request, first, stream, limit, params, advance))
            yield index, completions

    def _completion(
        self,
        request: Request,
        first: Tensor,
        stream: Sequence[int],
        limit: int,
        params: SamplingParams,
        advance: Advance | None,
    ) -> Completion:
        """One completion of a prompt that is computed. `first`: the logits of its first token."""
        uniforms = generator_of(stream).random(params.max_tokens)
        tokens: list[int] = []
        logprobs: list[float] = []
        logits, text_end = first, None
        stops = StopFinder(self._text, request, params) if params.stop else None
        while True:
            if len(tokens) < params.min_tokens:
                logits = logits.index_fill(1, torch.tensor(self.eos_ids), -torch.inf)
            token, logprob = sample_tokens(logits, torch.from_numpy(uniforms[len(tokens)][None]), params)
            tokens.append(int(token))
            logprobs.append(float(logprob))
            if advance is not None:
                advance(1)
            if stops is not None:
                text_end = stops.add(tokens[-1])
            if tokens[-1] in self.eos_ids or text_end is not None or len(tokens) == limit:
                return make_completion(self._text, request, tokens, logprobs, text_end, version=0)
            logits = self._logits(len(request.token_ids) + len(tokens) - 1, tokens[-1:])

    def _logits(self, position: int, tokens: Sequence[int]) -> Tensor:
        """The logits after some tokens, the first of which is at `position`; what was computed there is replaced."""
        self._llama.n_tokens = position
        self._llama.eval(list(tokens))
        logits = np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._llama.ctx, -1), shape=(self._size,))
        return torch.from_numpy(logits.copy())[None]
