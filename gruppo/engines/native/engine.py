"""The native engine: samples with the same transformers module that is being trained, in the same process.

Each prompt is computed once, and its completions share its keys and values. A decoding step runs one token of every
live slot. See `Scheduler` for how slots are filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import CompletionText, NonFiniteError, check_requests, find_stop, make_completion
from gruppo.engines.native.attention import DecodingAttention, PromptAttention
from gruppo.engines.native.kv_cache import KVCache
from gruppo.engines.native.sampling import sample_tokens
from gruppo.engines.native.scheduler import Finished, Scheduler
from gruppo.models.logprobs import OutputHead
from gruppo.models.ops.linear import packed
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource, named_weights
from gruppo.types import Completion
from gruppo.utils.progress import Advance
from gruppo.utils.system import free_memory

PREFILL_TOKENS = 4096
MAX_SLOTS = 256
MEMORY_SHARE = 0.2


def choose_slots(policy: LanguageModel, prompt_tokens: int, max_tokens: int, wanted: int) -> int:
    """Number of concurrent completions: `wanted`, at most 256, and at most what fits into a fifth of the free memory.

    The result is at least 1. A slot needs the keys and values of one completion and, at worst, of one prompt that it
    shares with no other slot.
    """
    budget = MEMORY_SHARE * free_memory(policy.device)
    return max(1, min(MAX_SLOTS, wanted, int(budget / (policy.cache_bytes * (prompt_tokens + max_tokens)))))


class NativeEngine(Engine):
    """See `Engine`."""

    copies_weights = False  # it samples with the module of the policy that it was built with

    def __init__(self, policy: LanguageModel, slots: int) -> None:
        self.policy, self.slots, self.version = policy, slots, 0

    @torch.no_grad()
    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. Weights of the module that this engine samples with are shared, not copied.

        Raises ValueError if the names of the weights are not the names of the engine's model.
        """
        if source.module is not self.policy.model:
            targets = named_weights(self.policy.model)
            self.policy.generation.advance()
            for name, tensor in source:
                if name not in targets:
                    raise ValueError(f"weights of {name!r}: the engine's model has no weight of that name")
                targets.pop(name).copy_(tensor)
            if targets:
                raise ValueError(f"weights of {min(targets)!r}: missing")
        self.version = version

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`."""
        groups = self._groups(requests, params, advance)
        while True:
            with self.policy.precision():  # not while the caller works on the result
                group = next(groups, None)
            if group is None:
                return
            yield group

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """See `Engine`. Runs in one block of `precision`, so that autocast keeps its copies of the weights."""
        with self.policy.precision():
            finished = dict(self._groups(requests, params, advance))
        return [finished[index] for index in range(len(requests))]

    def _groups(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        check_requests(requests)
        decoder = _Decoder(self.policy, self.slots, requests, params)
        while decoder.scheduler.busy:
            sampled = decoder.step()
            if advance is not None:
                advance(sampled)
            for index, group in decoder.scheduler.take_finished():
                yield index, [decoder.completion(requests[index], finished, self.version) for finished in group]
        for index, group in decoder.scheduler.take_finished():  # requests without streams
            assert not group
            yield index, []


class _Decoder:
    """Computes prompts and decoding steps for the requests of one call."""

    def __init__(self, policy: LanguageModel, slots: int, requests: Sequence[Request], params: SamplingParams) -> None:
        self.policy, self.params, self.requests = policy, params, requests
        slots = min(slots, sum(len(request.streams) for request in requests))
        longest = max((len(request.token_ids) for request in requests), default=1)
        accumulate = torch.promote_types(policy.dtype, torch.float32)
        self.cache = KVCache(slots, params.max_tokens, min(slots, len(requests)), longest, accumulate)
        self.scheduler = Scheduler(requests, slots, params, self.cache)
        self.eos, self.text = np.array(policy.eos_ids), CompletionText(policy.tokenizer, policy.eos_ids)
        self.head = self._packed_head()

    @torch.no_grad()
    def _packed_head(self) -> OutputHead:
        head = self.policy.head
        return head._replace(weight=packed(head.weight))

    @torch.no_grad()
    def step(self) -> int:
        """Prefill new prompts and sample first tokens if slots are free, else one token for every live slot.

        Returns the number of sampled tokens.
        """
        return self.admit() if self.scheduler.can_admit else self.decode()

    def admit(self) -> int:
        """Fill free slots, first with completions whose prompt is computed already, then with those of new prompts."""
        scheduler = self.scheduler
        if new := scheduler.next_prompts(PREFILL_TOKENS):
            self._compute_prompts(new)
        first = scheduler.live
        states = scheduler.fill_slots()
        return self._sample(torch.stack(states), np.arange(first, scheduler.live)) if states else 0

    def _compute_prompts(self, new: Sequence[tuple[int, Request, int]]) -> None:
        lengths = [len(request.token_ids) for _, request, _ in new]
        plan = PromptAttention(self.cache, [entry for _, _, entry in new], lengths)
        device = self.policy.device
        ids = torch.tensor([[token for _, request, _ in new for token in request.token_ids]], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        hidden = self.policy.hidden_states(ids, positions, plan)[0]
        ends = np.cumsum(lengths)
        last = hidden[torch.as_tensor(ends - 1, device=device)]
        for (index, request, entry), state in zip(new, last, strict=True):
            self.scheduler.add(index, request, entry, state)

    def decode(self) -> int:
        """Sample one more token for every live slot."""
        scheduler, device = self.scheduler, self.policy.device
        slots = np.arange(scheduler.live)
        last = scheduler.tokens[slots, scheduler.length[: scheduler.live] - 1]
        positions = torch.as_tensor(scheduler.positions, device=device)[:, None]
        ids = torch.as_tensor(last, device=device)[:, None]
        hidden = self.policy.hidden_states(ids, positions, DecodingAttention(scheduler, device))
        return self._sample(hidden[:, 0], slots)

    def _sample(self, hidden: Tensor, slots: np.ndarray) -> int:
        """Sample the next token of `slots` from their last hidden states, and retire the slots that are finished."""
        scheduler = self.scheduler
        logits = self.head.part_logits(hidden, slice(None))
        position = scheduler.length[slots]
        early = np.flatnonzero(position < self.params.min_tokens)
        if len(early):
            logits[np.ix_(early, self.eos)] = -torch.inf
        uniforms = torch.as_tensor(scheduler.uniforms[slots, position], device=logits.device)
        tokens, logprobs = sample_tokens(logits, uniforms, self.params)
        if not torch.isfinite(logprobs).all():
            raise NonFiniteError
        sampled = tokens.cpu().numpy()
        scheduler.append(slots, sampled, logprobs.cpu().numpy())
        ended = np.isin(sampled, self.eos) | (scheduler.length[slots] == scheduler.limit[slots])
        text_ends = self._find_stops(slots) if self.params.stop else {}
        for slot in slots[::-1].tolist():
            if ended[slot - slots[0]] or slot in text_ends:
                scheduler.retire(slot, text_ends.get(slot))
        return len(slots)

    def completion(self, request: Request, finished: Finished, version: int) -> Completion:
        """A finished completion of a request, sampled with the weights of this version."""
        return make_completion(self.text, request, finished.tokens, finished.logprobs, finished.text_end, version)

    def _find_stops(self, slots: np.ndarray) -> dict[int, int]:
        """The slots whose last token completed a stop string, and where that ends their text."""
        ends = {}
        for slot in slots.tolist():
            tokens = self.scheduler.tokens[slot, : int(self.scheduler.length[slot])].tolist()
            request = self.requests[self.scheduler.owner[slot][0]]
            if (end := find_stop(self.text, request, tokens, self.params)) is not None:
                ends[slot] = end
        return ends
