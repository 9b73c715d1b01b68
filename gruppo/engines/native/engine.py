"""The native engine: samples with the same transformers module that is being trained, in the same process.

Each prompt is computed once, and its completions share its keys and values. A decoding step runs one token of every
live slot. See `Scheduler` for how slots are filled. Keys and values of completions that a later request may continue
stay until then; see `Conversations`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import CompletionText, NonFiniteError, check_requests, make_completion
from gruppo.engines.native.attention import DecodingAttention, PromptAttention
from gruppo.engines.native.continued import Continued, ContinuedAttention
from gruppo.engines.native.kept import Conversation, Conversations
from gruppo.engines.native.kv_cache import PAGE_TOKENS, KVCache
from gruppo.engines.native.layout import DecodingLayout
from gruppo.engines.native.sampling import sample_tokens
from gruppo.engines.native.scheduler import Finished, Job, Scheduler, Waiting
from gruppo.engines.native.slot_state import SlotState
from gruppo.engines.native.transfer import Download
from gruppo.engines.stop_strings import StopFinder
from gruppo.models.logprobs import OutputHead
from gruppo.models.ops.linear import packed
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.progress import Advance
from gruppo.utils.transfer import upload

PREFILL_TOKENS = 4096
MAX_SLOTS = 256


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


class NativeEngine(Engine):
    """See `Engine`. `options`: those for the policy's device, unless they are given.

    Of the completions of a call whose request says `keep`, the first `slots` are kept. All that is kept is forgotten by
    a call that continues nothing, and by one that ends early, with an error or because its caller wants no more; also
    with new weights, and with `sleep`.
    """

    copies_weights = False  # it samples with the module of the policy that it was built with

    def __init__(self, policy: LanguageModel, slots: int, options: DecodingOptions | None = None) -> None:
        self.policy, self.slots, self.version = policy, slots, 0
        self.options = options or DecodingOptions.of(policy)
        self.kept = Conversations()

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. Weights of the module that this engine samples with are shared, not copied.

        Raises ValueError if the names of the weights are not the names of the engine's model.
        """
        self.kept.clear()
        if source.module is not self.policy.model:
            self.policy.take_weights(source)
        self.version = version

    def sleep(self) -> None:
        """See `Engine`."""
        self.kept.clear()

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
        whole = False
        try:
            decoder = _Decoder(self.policy, self.slots, requests, params, self.options, self.kept)
            while decoder.scheduler.busy:
                sampled = decoder.step()
                if advance is not None:
                    advance(sampled)
                for index, group in decoder.scheduler.take_finished():
                    yield index, [decoder.completion(requests[index], finished, self.version) for finished in group]
            for index, group in decoder.scheduler.take_finished():  # requests without streams
                assert not group
                yield index, []
            whole = True
        finally:
            if not whole:
                self.kept.clear()


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
        kept: Conversations,
    ) -> None:
        self.policy, self.params, self.requests, self.options = policy, params, requests, options
        self.kept, self.most_kept = kept, slots
        continued = kept.take([request.token_ids if request.continues else () for request in requests])
        self.jobs = [Job.of(*job) for job in zip(range(len(requests)), requests, continued, strict=True)]
        if not any(request.continues for request in requests):
            kept.clear()
        sizes = [len(request.streams) if request.keep else 0 for request in requests]
        self.kept_before = np.cumsum([0, *sizes])  # completions to keep of the requests before each
        slots = min(slots, sum(len(request.streams) for request in requests))
        longest = max((len(job.prompt) for job in self.jobs), default=1)
        entries = min(slots, len(requests))
        self.cache = KVCache(slots, self._own_room(), entries, longest, options.cache_dtype, options.page_tokens)
        self.scheduler = Scheduler(self.jobs, slots, params, self.cache)
        self.state = SlotState(slots, params.max_tokens + options.lag, options.paired_uniforms, policy.device)
        self.layout: DecodingLayout | None = None
        self.eos, self.text = np.array(policy.eos_ids), CompletionText(policy.tokenizer, policy.eos_ids)
        self.stops: dict[int, StopFinder] = {}
        self.new: list[_Rows] = []  # slots that were filled since the last step, and what it samples their tokens from
        self.unread: deque[_Sampled] = deque()
        self.head = self._packed_head()

    def _own_room(self) -> int:
        """The most tokens of a slot: a completion, behind the own tokens of its request."""
        room = self.params.max_tokens
        for job in self.jobs:
            for number in range(len(job.request.streams) if job.own else 0):
                room = max(room, len(job.own) + job.request.limit(number, self.params))
        return room

    @torch.no_grad()
    def _packed_head(self) -> OutputHead:
        head = self.policy.head
        return head._replace(weight=packed(head.weight))

    @torch.no_grad()
    def step(self) -> int:
        """Fill free slots, or as many as one pass over new prompts allows; once none is left to fill, sample one token
        for every live slot.

        Returns the number of sampled tokens that the host has read and that belong to completions.
        """
        if self.scheduler.can_admit:
            self.admit()
        if not self.scheduler.can_admit:
            self.scheduler.close_gaps()
            if self.scheduler.live:
                self.sample()
        return self.read() if len(self.unread) > self.options.lag else 0

    def admit(self) -> None:
        """Fill free slots, first with completions whose prompt is computed already, then with those of new prompts."""
        scheduler = self.scheduler
        if taken := scheduler.next_jobs(PREFILL_TOKENS):
            self._compute_prompts(taken)
        filled = scheduler.fill_slots(PREFILL_TOKENS)
        if not filled:
            return
        slots = np.array([slot for slot, _ in filled])
        completions = [completion for _, completion in filled]
        streams = [completion.stream for completion in completions] if self.params.temperature else []
        on_device = self.state.admit(slots, streams, self.params.max_tokens)
        if self.params.stop:
            for slot, completion in filled:
                self.stops[slot] = StopFinder(self.text, completion.job.request, self.params)
        self.layout = None
        self.new.append(_Rows(slots, on_device, torch.stack(self._last_states(completions, slots))))

    def _compute_prompts(self, taken: Sequence[tuple[Job, int, bool]]) -> None:
        """Compute the prompts of requests, unless they are in the cache or were kept."""
        new = [(job, entry) for job, entry, there in taken if not there and job.kept is None]
        states = dict(zip([entry for _, entry in new], self._prompt_states(new), strict=True)) if new else {}
        for job, entry, there in taken:
            if not there and job.kept is not None:
                self.cache.load_prompt(entry, job.kept.prompt)
            self.scheduler.add(job, entry, None if job.own else states[entry])

    def _prompt_states(self, new: Sequence[tuple[Job, int]]) -> Tensor:
        """The last hidden states of prompts, whose keys and values go to their entries."""
        lengths = [len(job.prompt) for job, _ in new]
        prompts = self.policy.attention([(length, ()) for length in lengths], self.policy.device)
        plan = PromptAttention(prompts, self.cache, [entry for _, entry in new], lengths)
        tokens = [token for job, _ in new for token in job.prompt]
        places = [place for length in lengths for place in range(length)]
        ids, positions, ends = upload([tokens, places, np.cumsum(lengths) - 1], torch.long, self.policy.device)
        return self.policy.hidden_states(ids[None], positions[None], plan)[0][ends]

    def _last_states(self, filled: Sequence[Waiting], slots: np.ndarray) -> list[Tensor]:
        """The hidden states that the first tokens of completions are sampled from.

        Own tokens of their requests, behind the prompt, are computed now, unless they were kept.
        """
        own = [place for place, completion in enumerate(filled) if completion.job.own]
        states = {}
        if own:
            active = self.scheduler.active
            lengths = self.scheduler.before[active] + self.scheduler.sampled[active]
            self.cache.completions.reserve(active, np.maximum(lengths, 1))
            computed = self._own_states([(int(slots[place]), filled[place]) for place in own])
            states = dict(zip(own, computed, strict=True))
        return [states[place] if one.state is None else one.state for place, one in enumerate(filled)]

    def _own_states(self, filled: Sequence[tuple[int, Waiting]]) -> Tensor:
        """The last hidden states of the own tokens of completions in slots."""
        sequences, tokens, places = [], list[int](), list[int]()
        for slot, completion in filled:
            job = completion.job
            if job.kept is not None:
                self.cache.completions.restore(slot, job.kept.pairs)
                if completion.number == len(job.request.streams) - 1:
                    job.kept = None  # its memory is free
            new, start = job.own[job.known :], len(job.prompt) + job.known
            sequences.append(Continued(slot, completion.entry, len(job.prompt), job.known, len(new)))
            tokens += new
            places += range(start, start + len(new))
        plan = ContinuedAttention(self.cache, sequences, self.policy.device)
        ends = np.cumsum([sequence.new for sequence in sequences]) - 1
        ids, positions, last = upload([tokens, places, ends], torch.long, self.policy.device)
        return self.policy.hidden_states(ids[None], positions[None], plan)[0][last]

    def sample(self) -> None:
        """Sample one token for every live slot, with one product with the output head.

        A slot that was just filled has a row of the decoding step too, so that rows and pages are those of the next
        steps. What the row computes is replaced by the state that the first token is sampled from; what it writes to
        the cache, by the first token's key and value.
        """
        new = _Rows.joined(self.new) if self.new else None
        self.new.clear()
        if new is not None and len(new.slots) == self.scheduler.live:
            self._sample(new)
            return
        rows = self.decode()
        if new is not None:
            place = np.empty(self.scheduler.slots, dtype=np.int64)
            place[rows.slots] = np.arange(len(rows.slots))
            (places,) = upload([place[new.slots]], torch.long, self.policy.device)
            rows = rows._replace(hidden=rows.hidden.index_copy(0, places, new.hidden))
        self._sample(rows)

    def decode(self) -> _Rows:
        """Read the last token of every live slot."""
        scheduler, slots = self.scheduler, self.scheduler.active.copy()
        lengths = scheduler.next_place[slots] + 1
        if self.cache.completions.reserve(slots, lengths) or self.layout is None:
            self.layout = DecodingLayout(scheduler, self.policy.device)
        on_device = self.layout.slots
        length = self.layout.before + self.state.length[on_device].clamp(min=1)
        plan = DecodingAttention(self.layout, length, int(lengths.max()), int(lengths.min()))
        ids, positions = self.state.token[on_device], self.layout.prompt_lengths + plan.position
        hidden = self.policy.hidden_states(ids[:, None], positions[:, None], plan)
        return _Rows(slots, on_device, hidden[:, 0])

    def _sample(self, rows: _Rows) -> None:
        """Sample the next token of slots from their last hidden states."""
        scheduler, state = self.scheduler, self.state
        slots, on_device, hidden = rows
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
            self._keep(slot)
            scheduler.retire(slot, ends[slot])
            for later in self.unread:
                later.kept &= later.slots != slot
        if ends:
            self.layout = None
        return len(slots)

    def _keep(self, slot: int) -> None:
        """Keep the conversation that the finished completion of a slot ends, if its request says so and it is one of
        the first. Its last token is not in it, unless a further step has read it."""
        scheduler, cache = self.scheduler, self.cache
        request, number = scheduler.owner[slot]
        job = self.jobs[request]
        if not job.request.keep or self.kept_before[request] + number >= self.most_kept:
            return
        sampled = int(min(scheduler.length[slot], scheduler.sampled[slot] - 1))
        own = (*job.own, *scheduler.tokens[slot, :sampled].tolist())
        prompt = cache.keep_prompt(int(scheduler.entry[slot]), job.prompt)
        self.kept.put(Conversation(prompt, own, cache.completions.copy(slot, len(own))), self.most_kept)

    def completion(self, request: Request, finished: Finished, version: int) -> Completion:
        """A finished completion of a request, sampled with the weights of this version."""
        return make_completion(self.text, request, finished.tokens, finished.logprobs, finished.text_end, version)


class _Rows(NamedTuple):
    """Slots, on the host and on the device, and the hidden states that their next tokens are sampled from."""

    slots: np.ndarray
    on_device: Int[Tensor, " N"]
    hidden: Float[Tensor, "N H"]

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        """All parts in one."""
        on_device, hidden = torch.cat([part.on_device for part in parts]), torch.cat([part.hidden for part in parts])
        return cls(np.concatenate([part.slots for part in parts]), on_device, hidden)


@dataclass
class _Sampled:
    """A step whose tokens the host has not read. `kept`: which of its slots were not retired since."""

    slots: np.ndarray
    kept: np.ndarray
    download: Download
