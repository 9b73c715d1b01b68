"""The native engine: samples with the same transformers module that is being trained, in the same process.

Each prompt is computed once, and its completions share its keys and values. A decoding step runs one token of every
live slot. See `Scheduler` for how slots are filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import CompletionText, NonFiniteError, check_requests, make_completion
from gruppo.engines.native.attention import DecodingAttention, PromptAttention
from gruppo.engines.native.kv_cache import PAGE_TOKENS, KVCache, room
from gruppo.engines.native.layout import DecodingLayout
from gruppo.engines.native.sampling import sample_tokens
from gruppo.engines.native.scheduler import Finished, Scheduler
from gruppo.engines.native.slot_state import SlotState
from gruppo.engines.native.transfer import Download
from gruppo.engines.stop_strings import StopFinder
from gruppo.models.logprobs import OutputHead
from gruppo.models.ops.linear import packed
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance
from gruppo.utils.system import free_memory
from gruppo.utils.transfer import upload

PREFILL_TOKENS = 4096
MAX_SLOTS = 256
MEMORY_SHARE = 0.2


@dataclass(frozen=True)
class DecodingOptions:
    """Where decoding keeps its data, and when the host reads it. Changes results by rounding at most.

    `cache_dtype`: of keys and values. `page_tokens`: size of the cache's pages; None: one page per sequence, allocated
    at once, which the CPU's kernels need. `lag`: by how many steps the host reads tokens later, so that a device does
    not wait for it. `paired_uniforms`: random numbers in two float32 numbers each, for devices without float64.
    """

    cache_dtype: torch.dtype
    page_tokens: int | None = None
    lag: int = 0
    paired_uniforms: bool = False

    @staticmethod
    def of(policy: LanguageModel) -> DecodingOptions:
        """The options for the device of a policy."""
        if policy.device.type == "cpu":
            return DecodingOptions(policy.cache_dtype)
        return DecodingOptions(policy.cache_dtype, PAGE_TOKENS, 1, policy.device.type == "mps")


def choose_slots(policy: LanguageModel, prompt_tokens: int, max_tokens: int, wanted: int) -> int:
    """Number of concurrent completions: `wanted`, at most 256, and at most what fits into a fifth of the free memory.

    The result is at least 1. A slot needs the keys and values of one completion and, at worst, of one prompt that it
    shares with no other slot.
    """
    page_tokens = DecodingOptions.of(policy).page_tokens
    tokens = room(prompt_tokens, page_tokens) + room(max_tokens, page_tokens)
    budget = MEMORY_SHARE * free_memory(policy.device)
    return max(1, min(MAX_SLOTS, wanted, int(budget / (policy.cache_bytes * tokens))))


class NativeEngine(Engine):
    """See `Engine`. `options`: those for the policy's device, unless they are given."""

    copies_weights = False  # it samples with the module of the policy that it was built with

    def __init__(self, policy: LanguageModel, slots: int, options: DecodingOptions | None = None) -> None:
        self.policy, self.slots, self.version = policy, slots, 0
        self.options = options or DecodingOptions.of(policy)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. Weights of the module that this engine samples with are shared, not copied.

        Raises ValueError if the names of the weights are not the names of the engine's model.
        """
        if source.module is not self.policy.model:
            self.policy.take_weights(source)
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
        decoder = _Decoder(self.policy, self.slots, requests, params, self.options)
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
    """Computes prompts and decoding steps for the requests of one call.

    What a step reads is on the device already: the tokens of the step before it, their positions, the random numbers.
    The host reads the sampled tokens `options.lag` steps later, in one transfer per step. Until then, a completion that
    is finished continues, and its further tokens are dropped.
    """

    def __init__(
        self,
        policy: LanguageModel,
        slots: int,
        requests: Sequence[Request],
        params: SamplingParams,
        options: DecodingOptions,
    ) -> None:
        self.policy, self.params, self.requests, self.options = policy, params, requests, options
        slots = min(slots, sum(len(request.streams) for request in requests))
        longest = max((len(request.token_ids) for request in requests), default=1)
        entries = min(slots, len(requests))
        self.cache = KVCache(slots, params.max_tokens, entries, longest, options.cache_dtype, options.page_tokens)
        self.scheduler = Scheduler(requests, slots, params, self.cache)
        self.state = SlotState(slots, params.max_tokens + options.lag, options.paired_uniforms, policy.device)
        self.layout: DecodingLayout | None = None
        self.eos, self.text = np.array(policy.eos_ids), CompletionText(policy.tokenizer, policy.eos_ids)
        self.stops: dict[int, StopFinder] = {}
        self.unread: deque[_Sampled] = deque()
        self.head = self._packed_head()

    @torch.no_grad()
    def _packed_head(self) -> OutputHead:
        head = self.policy.head
        return head._replace(weight=packed(head.weight))

    @torch.no_grad()
    def step(self) -> int:
        """Prefill new prompts and sample first tokens if slots are free, else one token for every live slot.

        Returns the number of sampled tokens that the host has read and that belong to completions.
        """
        if self.scheduler.can_admit:
            self.admit()
        elif self.scheduler.live:
            self.decode()
        return self.read() if len(self.unread) > self.options.lag else 0

    def admit(self) -> None:
        """Fill free slots, first with completions whose prompt is computed already, then with those of new prompts."""
        scheduler = self.scheduler
        if new := scheduler.next_prompts(PREFILL_TOKENS):
            self._compute_prompts(new)
        filled = scheduler.fill_slots()
        if not filled:
            return
        slots = scheduler.active[scheduler.live - len(filled) :].copy()
        streams = [completion.stream for completion in filled] if self.params.temperature else []
        on_device = self.state.admit(slots, streams, self.params.max_tokens)
        if self.params.stop:
            for slot, completion in zip(slots.tolist(), filled, strict=True):
                self.stops[slot] = StopFinder(self.text, self.requests[completion.request], self.params)
        self.layout = None
        self._sample(torch.stack([completion.state for completion in filled]), slots, on_device)

    def _compute_prompts(self, new: Sequence[tuple[int, Request, int]]) -> None:
        lengths = [len(request.token_ids) for _, request, _ in new]
        prompts = self.policy.attention([(length, ()) for length in lengths], self.policy.device)
        plan = PromptAttention(prompts, self.cache, [entry for _, _, entry in new], lengths)
        tokens = [token for _, request, _ in new for token in request.token_ids]
        places = [place for length in lengths for place in range(length)]
        ids, positions, ends = upload([tokens, places, np.cumsum(lengths) - 1], torch.long, self.policy.device)
        last = self.policy.hidden_states(ids[None], positions[None], plan)[0][ends]
        for (index, request, entry), state in zip(new, last, strict=True):
            self.scheduler.add(index, request, entry, state)

    def decode(self) -> None:
        """Sample one more token for every live slot."""
        scheduler, slots = self.scheduler, self.scheduler.active.copy()
        lengths = scheduler.sampled[slots]
        if self.cache.completions.reserve(slots, lengths) or self.layout is None:
            self.layout = DecodingLayout(scheduler, self.policy.device)
        on_device = self.layout.slots
        length = self.state.length[on_device]
        plan = DecodingAttention(self.layout, length, int(lengths.max()), int(lengths.min()))
        ids, positions = self.state.token[on_device], self.layout.prompt_lengths + plan.position
        hidden = self.policy.hidden_states(ids[:, None], positions[:, None], plan)
        self._sample(hidden[:, 0], slots, on_device)

    def _sample(self, hidden: Tensor, slots: np.ndarray, on_device: Tensor) -> None:
        """Sample the next token of `slots` from their last hidden states."""
        scheduler, state = self.scheduler, self.state
        logits = self.head.part_logits(hidden, slice(None))
        length = state.length[on_device]
        if (scheduler.sampled[slots] < self.params.min_tokens).any():
            early = (length < self.params.min_tokens)[:, None]
            for token in self.policy.eos_ids:
                logits[:, token : token + 1].masked_fill_(early, -torch.inf)
        tokens, logprobs = sample_tokens(logits, state.uniforms[on_device, length], self.params)
        state.append(on_device, tokens, length)
        scheduler.sampled[slots] += 1
        self.unread.append(_Sampled(slots, np.ones(len(slots), dtype=bool), Download(tokens, logprobs)))

    def read(self) -> int:
        """Read the tokens of the oldest step that is not read, and retire the slots that are finished."""
        scheduler, step = self.scheduler, self.unread.popleft()
        slots = step.slots[step.kept]
        tokens, logprobs = (array[step.kept] for array in step.download.result())
        if not np.isfinite(logprobs).all():
            raise NonFiniteError
        scheduler.append(slots, tokens, logprobs)
        ended = np.isin(tokens, self.eos) | (scheduler.length[slots] == scheduler.limit[slots])
        ends: dict[int, int | None] = dict.fromkeys(slots[ended].tolist())
        if self.params.stop:
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                if (end := self.stops[slot].add(token)) is not None:
                    ends[slot] = end
        for slot in reversed([slot for slot in slots.tolist() if slot in ends]):
            scheduler.retire(slot, ends[slot])
            for later in self.unread:
                later.kept &= later.slots != slot
        if ends:
            self.layout = None
        return len(slots)

    def completion(self, request: Request, finished: Finished, version: int) -> Completion:
        """A finished completion of a request, sampled with the weights of this version."""
        return make_completion(self.text, request, finished.tokens, finished.logprobs, finished.text_end, version)


@dataclass
class _Sampled:
    """A step whose tokens the host has not read. `kept`: which of its slots were not retired since."""

    slots: np.ndarray
    kept: np.ndarray
    download: Download
