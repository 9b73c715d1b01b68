"""The engine that drives the same transformers module that is being trained, in the same process.

Each prompt is computed once and its keys and values are shared by its completions. A decoding step runs one token of
every completion in flight; a slot whose completion ended takes the next one of the queue, and when the queue is empty
the last slot moves into the gap, so that slots 0..n-1 are always the live ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.engines.base import Request, SamplingOptions
from gruppo.errors import RunError
from gruppo.models.attention.interface import Layer, SharedPrefixAttention, soft_capped
from gruppo.models.logprobs import OutputHead
from gruppo.models.ops.cpu.bindings import Norms, Rope, attend_decoding, sample
from gruppo.models.ops.linear import packed
from gruppo.models.policy import LanguageModel
from gruppo.types import Completion, FinishReason
from gruppo.utils.progress import Advance
from gruppo.utils.system import free_memory

PREFILL_TOKENS = 4096
MAX_SLOTS = 256
MEMORY_SHARE = 0.2
FEW_QUERIES = 8  # of a head: torch's attention kernel on a CPU is made for more, and 1.6 times as slow as two products
UNSEEN = -1e30  # finite, so that a row that sees nothing of its prompt has no NaN and no weight


def sample_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], options: SamplingOptions
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Draw a token a row from softmax(logits / temperature), truncated as the options say, by inverting its
    distribution function at `uniforms`.

    One uniform number in [0, 1) a row, and one pass over the logits: sums of blocks choose the block, then the sums
    within it the token. Returns the tokens and their log-probabilities (nats) under the distribution drawn from.
    With temperature 0 the likeliest token and its log-probability at temperature 1. A token of probability 0 is
    never drawn.
    """
    plain = options.top_k <= 0 and options.top_p >= 1 and options.min_p <= 0
    if options.temperature and plain and (drawn := sample(logits, options.temperature, uniforms)) is not None:
        return drawn
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not options.temperature:
        likeliest = logits.max(dim=-1)
        return likeliest.indices, likeliest.values - logits.logsumexp(dim=-1)
    weights = truncated_probabilities(logits, options)
    rows, size = len(weights), 256
    if over := weights.shape[-1] % size:
        weights = torch.nn.functional.pad(weights, (0, size - over))
    blocks = weights.view(rows, -1, size)
    block_ends = blocks.sum(dim=-1).double().cumsum(dim=-1)
    goal = uniforms.double() * block_ends[:, -1]
    block = _first_beyond(block_ends, goal)
    below = torch.nn.functional.pad(block_ends, (1, 0)).gather(-1, block[:, None]).squeeze(-1)
    chosen = blocks[torch.arange(rows, device=logits.device), block]
    tokens = block * size + _first_beyond(chosen.double().cumsum(dim=-1), goal - below)
    return tokens, weights.gather(-1, tokens[:, None]).squeeze(-1).log()


def truncated_probabilities(logits: Float[Tensor, "B V"], options: SamplingOptions) -> Float[Tensor, "B V"]:
    """softmax(logits / temperature) with the tokens that top-k, top-p and min-p leave out at 0, summing to 1.

    top-p keeps the fewest likeliest tokens whose probabilities, among those that top-k left, sum to at least p; the
    likeliest token always stays.
    """
    if options.temperature != 1:
        logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        border = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        likelier = torch.softmax(ordered, dim=-1).double().cumsum(dim=-1).roll(1, dims=-1)
        likelier[:, 0] = 0
        beyond = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= options.top_p)
        logits = logits.masked_fill(beyond, -torch.inf)
    if options.min_p > 0:
        border = logits.max(dim=-1, keepdim=True).values + math.log(options.min_p)
        logits = logits.masked_fill(logits < border, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _first_beyond(ends: Tensor, goal: Tensor) -> Tensor:
    """Index of the first of the rising `ends` that is more than `goal`; at most the last one that rises."""
    index = (ends <= goal[:, None]).sum(dim=-1)
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(index, last)


def choose_slots(policy: LanguageModel, prompt_tokens: int, max_tokens: int, wanted: int) -> int:
    """Completions in flight: as many as are wanted, as 256, and as a fifth of the free memory holds, at least 1.

    A slot holds the keys and values of one completion and, at worst, of a prompt of its own.
    """
    budget = MEMORY_SHARE * free_memory(policy.device)
    return max(1, min(MAX_SLOTS, wanted, int(budget / (policy.cache_bytes * (prompt_tokens + max_tokens)))))


class NativeEngine:
    """See `Engine`."""

    def __init__(self, policy: LanguageModel, slots: int) -> None:
        self.policy, self.slots, self.version = policy, slots, 0

    def load_weights(self, policy: LanguageModel, version: int) -> None:
        """See `Engine`. The module is shared: nothing is copied."""
        self.policy, self.version = policy, version

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], options: SamplingOptions, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """See `Engine`."""
        longest = max((len(request.token_ids) for request in requests), default=1)
        if min((len(request.token_ids) for request in requests), default=1) < 1:
            raise ValueError("a prompt of a request has no tokens; give at least one")
        for request in requests:
            if request.limits is not None and (len(request.limits) != len(request.streams) or min(request.limits) < 1):
                raise ValueError(
                    f"limits of a request = {list(request.limits)}: must be one for each of its {len(request.streams)} "
                    "streams, each at least 1"
                )
        wanted = sum(len(request.streams) for request in requests)
        state = _Flight(self.policy, min(self.slots, wanted), min(self.slots, len(requests)), longest, options)
        queue = deque(enumerate(requests))
        with self.policy.precision():
            head = self.policy.head
            head = head._replace(weight=packed(head.weight))
            while queue or state.waiting or state.live:
                if state.free and (queue or state.waiting):
                    state.admit(queue, head)
                else:
                    state.decode(head)
                if advance is not None:
                    advance(state.made_since())
        return [
            [self._completion(state.finished[index, number]) for number in range(len(request.streams))]
            for index, request in enumerate(requests)
        ]

    def _completion(self, raw: _Raw) -> Completion:
        ended = raw.tokens[-1] in self.policy.eos_ids
        reason: FinishReason = "stop" if ended or raw.text_end is not None else "length"
        text = _text(self.policy, raw.tokens[:-1] if ended else raw.tokens)
        return Completion(
            token_ids=tuple(raw.tokens),
            sampling_logprobs=tuple(raw.logprobs),
            mask=(True,) * len(raw.tokens),
            finish_reason=reason,
            policy_version=self.version,
            text=text[: raw.text_end],
        )


def _text(policy: LanguageModel, tokens: list[int]) -> str:
    return str(policy.tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class _Raw:
    """`text_end`: where a stop text begins, if one ended it."""

    tokens: list[int]
    logprobs: list[float]
    text_end: int | None


class _Flight:
    """The completions in flight: their keys and values, and where each stands. It is the attention plan of decoding.

    A row is a live slot. Keys and values are kept in float32 (float64 in proofs).
    """

    def __init__(
        self, policy: LanguageModel, slots: int, places: int, longest_prompt: int, options: SamplingOptions
    ) -> None:
        """`slots`: completions in flight; `places`: prompts whose keys and values are kept at a time."""
        self.policy, self.options, self.slots = policy, options, slots
        self.places_kept, self.longest_prompt = places, longest_prompt
        self.wide = torch.promote_types(policy.dtype, torch.float32)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.prefix_lengths = np.zeros(places, dtype=np.int64)
        self.prefix_users = np.zeros(places, dtype=np.int64)
        self.live = 0
        self.owner: list[tuple[int, int]] = [(0, 0)] * slots
        self.prefix_of = np.zeros(slots, dtype=np.int64)
        self.length = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.tokens = np.zeros((slots, options.max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((slots, options.max_tokens))
        self.uniforms = np.zeros((slots, options.max_tokens))
        self.finished: dict[tuple[int, int], _Raw] = {}
        self.waiting: deque[tuple[int, int, tuple[int, ...], int, int, Tensor]] = deque()
        self.eos = np.array(policy.eos_ids)
        self._made = 0

    @property
    def free(self) -> int:
        return self.slots - self.live

    def made_since(self) -> int:
        """Tokens made since this was last asked."""
        made, self._made = self._made, 0
        return made

    def admit(self, queue: deque[tuple[int, Request]], head: OutputHead) -> None:
        """Fill free slots: first with completions whose prompt is computed already, then with new prompts."""
        new: list[tuple[int, Request, int]] = []
        places = deque(np.flatnonzero(self.prefix_users == 0).tolist())
        room, tokens = self.free - len(self.waiting), 0
        while queue and room > 0 and places and (not new or tokens + len(queue[0][1].token_ids) <= PREFILL_TOKENS):
            index, request = queue.popleft()
            tokens, room = tokens + len(request.token_ids), room - len(request.streams)
            new.append((index, request, places.popleft()))
        if new:
            self._prefill(new)
        self._seat(head)

    def _prefill(self, new: Sequence[tuple[int, Request, int]]) -> None:
        lengths = [len(request.token_ids) for _, request, _ in new]
        plan = _Prefill(self, [place for _, _, place in new], lengths)
        device = self.policy.device
        ids = torch.tensor([[token for _, request, _ in new for token in request.token_ids]], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        hidden = self.policy.hidden_states(ids, positions, plan)[0]
        ends = np.cumsum(lengths)
        last = hidden[torch.as_tensor(ends - 1, device=device)]
        for (index, request, place), length, state in zip(new, lengths, last, strict=True):
            self.prefix_lengths[place], self.prefix_users[place] = length, len(request.streams)
            most = self.options.max_tokens
            for number, stream in enumerate(request.streams):
                limit = most if request.limits is None else min(most, request.limits[number])
                self.waiting.append((index, number, tuple(stream), limit, place, state))

    def keep(self, layer: Layer, made: Sequence[Tensor], places: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep a layer's keys and values [heads, Σ lengths, D] of prompts."""
        if layer.index not in self.own:
            self.own[layer.index] = self._room(made, self.slots, self.options.max_tokens)
            self.prefix[layer.index] = self._room(made, self.places_kept, self.longest_prompt)
        for store, each in zip(self.prefix[layer.index], made, strict=True):
            for place, length, part in zip(places, lengths, each.split(list(lengths), dim=1), strict=True):
                store[place, :, :length] = part

    def _room(self, made: Sequence[Tensor], rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.zeros(rows, len(each), tokens, each.shape[-1], dtype=self.wide, device=each.device) for each in made
        )
        return keys, values

    def _seat(self, head: OutputHead) -> None:
        """Give free slots to waiting completions and draw their first tokens."""
        first = self.live
        states = []
        while self.waiting and self.free:
            index, number, stream, limit, place, state = self.waiting.popleft()
            row = self.live
            self.owner[row], self.prefix_of[row], self.length[row] = (index, number), place, 0
            self.limit[row] = limit
            if self.options.temperature:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(stream)))
                self.uniforms[row] = generator.random(self.options.max_tokens)
            states.append(state)
            self.live += 1
        if states:
            self._draw(torch.stack(states), np.arange(first, self.live), head)

    def decode(self, head: OutputHead) -> None:
        """One more token for every completion in flight."""
        rows = np.arange(self.live)
        length = self.length[: self.live]
        last = self.tokens[rows, length - 1]
        positions = self.prefix_lengths[self.prefix_of[: self.live]] + length - 1
        device = self.policy.device
        self._plan_step()
        ids = torch.as_tensor(last, device=device)[:, None]
        hidden = self.policy.hidden_states(ids, torch.as_tensor(positions, device=device)[:, None], self)
        self._draw(hidden[:, 0], rows, head)

    def _draw(self, hidden: Tensor, rows: np.ndarray, head: OutputHead) -> None:
        """Sample the next token of `rows` from their last hidden states, and retire what has ended."""
        logits = head.part_logits(hidden, slice(None))
        position = self.length[rows]
        early = np.flatnonzero(position < self.options.min_tokens)
        if len(early):
            logits[np.ix_(early, self.eos)] = -torch.inf
        uniforms = torch.as_tensor(self.uniforms[rows, position], device=logits.device)
        tokens, logprobs = sample_tokens(logits, uniforms, self.options)
        if not torch.isfinite(logprobs).all():
            raise RunError(
                "the model gives log-probabilities that are not finite: its weights have diverged or are damaged, or "
                "the temperature is too small for them; begin again with a lower optimizer.learning_rate"
            )
        drawn = tokens.cpu().numpy()
        self.tokens[rows, position] = drawn
        self.logprobs[rows, position] = logprobs.cpu().numpy()
        self.length[rows] += 1
        self._made += len(rows)
        ended = np.isin(drawn, self.eos) | (self.length[rows] == self.limit[rows])
        text_ends = self._find_stops(rows) if self.options.stop else {}
        for row in rows[::-1].tolist():
            if ended[row - rows[0]] or row in text_ends:
                self._retire(row, text_ends.get(row))

    def _find_stops(self, rows: np.ndarray) -> dict[int, int]:
        """Rows whose text their last token completed a stop text of, and where in their text that begins. The text is
        that of all tokens so far: a token's own text can depend on those before it."""
        found = {}
        for row in rows.tolist():
            length = int(self.length[row])
            if length < self.options.min_tokens:
                continue
            tokens = self.tokens[row, :length].tolist()
            text, before = _text(self.policy, tokens), _text(self.policy, tokens[:-1])
            pairs = enumerate(zip(before, text))  # the last token of a character changes what its first ones gave
            same = next((place for place, (old, new) in pairs if old != new), min(len(before), len(text)))
            starts = [text.find(stop, max(0, same - len(stop) + 1)) for stop in self.options.stop]
            if any(start >= 0 for start in starts):
                found[row] = min(start for start in starts if start >= 0)
        return found

    def _retire(self, row: int, text_end: int | None) -> None:
        """Keep what the row made and move the last live row into its slot."""
        length = int(self.length[row])
        tokens, logprobs = self.tokens[row, :length].tolist(), self.logprobs[row, :length].tolist()
        self.finished[self.owner[row]] = _Raw(tokens, logprobs, text_end)
        self.prefix_users[self.prefix_of[row]] -= 1
        self.live -= 1
        last = self.live
        if row == last:
            return
        self.owner[row] = self.owner[last]
        for array in (self.prefix_of, self.length, self.limit, self.tokens, self.logprobs, self.uniforms):
            array[row] = array[last]
        used = int(self.length[row])
        for pair in self.own.values():
            for store in pair:
                store[row, :, :used] = store[last, :, :used]

    def _plan_step(self) -> None:
        """Indices and masks of a decoding step, the same for every layer."""
        device, live = self.policy.device, self.live
        places, member = np.unique(self.prefix_of[:live], return_inverse=True)
        order = np.argsort(member, kind="stable")
        starts = np.searchsorted(member[order], np.arange(len(places)))
        seat = np.empty(live, dtype=np.int64)
        seat[order] = np.arange(live) - starts[member[order]]
        rows = np.zeros((len(places), int(seat.max()) + 1), dtype=np.int64)
        rows[member, seat] = np.arange(live)
        lengths = self.prefix_lengths[places]
        at = (order, self.prefix_of[:live], self.prefix_lengths[self.prefix_of[:live]], self.length[:live] - 1)
        self.row_numbers = [torch.as_tensor(each, device=device) for each in at]
        self.rows_of_place = torch.as_tensor(rows, device=device)
        self.seated = torch.as_tensor(member * rows.shape[1] + seat, device=device)
        self.longest_prefix, self.longest_own = int(lengths.max()), int(self.length[:live].max())
        self.seen_lengths = torch.as_tensor(self.length[:live], device=device)
        self.seen_prefixes = torch.as_tensor(self.prefix_lengths[self.prefix_of[:live]], device=device)
        self.rows = torch.arange(live, device=device)
        self.position = self.seen_lengths - 1
        # A slice where an index would do the same, but slower.
        begun = self.length[:live]
        together = begun.min() == begun.max()
        self.written = (
            (slice(live), slice(None), int(begun[0]) - 1) if together else (self.rows, slice(None), self.position)
        )
        whole = len(places) == int(places[-1]) + 1
        self.places = slice(len(places)) if whole else torch.as_tensor(places, device=device)
        self.biases: dict[tuple[int | None, int], tuple[Tensor | None, Tensor]] = {}
        self.together = bool(together)
        self.dense = bool((rows.ravel() == np.arange(live)).all()) if rows.size == live else False

    def _bias(self, window: int | None, shared: int) -> tuple[Tensor | None, Tensor]:
        """What is added to the scores of own keys [live, 1, 1, longest], None where all are seen, and of prompt keys
        [places, 1, seats · shared or 1, longest]: 0 where a key is seen, a number below every score where not."""
        if window is not None and window >= self.longest_prefix + self.longest_own:
            window = None
        if (window, shared) not in self.biases:
            own_key = torch.arange(self.longest_own, device=self.policy.device)
            key = torch.arange(self.longest_prefix, device=self.policy.device)
            own = own_key < self.seen_lengths[:, None]
            prefix = key < self.seen_prefixes[:, None]
            if window is not None:
                own &= own_key > (self.position - window)[:, None]
                prefix &= key > (self.seen_prefixes + self.position - window)[:, None]
            if window is None:  # the seats of a place see the same
                by_place = prefix[self.rows_of_place[:, :1]]
            else:
                by_place = prefix[self.rows_of_place].repeat_interleave(shared, dim=1)
            whole = self.together and window is None
            own_bias = None if whole else self._penalty(own[:, None, None])
            self.biases[window, shared] = own_bias, self._penalty(by_place[:, None])
        return self.biases[window, shared]

    def _penalty(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.wide, device=seen.device).masked_fill_(~seen, UNSEEN)

    def attend_projected(
        self, layer: Layer, projected: Tensor, queries: int, rope: Rope, norms: Norms
    ) -> Tensor | None:
        """See `ProjectedAttention`; N is a row a completion in flight."""
        if layer.softcap is not None or layer.sinks is not None:
            return None
        stores = self.own[layer.index], self.prefix[layer.index]
        return attend_decoding(projected, queries, rope, norms, layer.scale, layer.window, *stores, self.row_numbers)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; T = 1. Attention over the shared prompt and over the completion's own tokens, each
        normalised by itself, joined by their log-sum-exps."""
        with torch.autocast(self.policy.device.type, enabled=False):
            live, heads, _, width = query.shape
            kv_heads = key.shape[1]
            shared = heads // kv_heads
            own_keys, own_values = self.own[layer.index]
            prefix_keys, prefix_values = self.prefix[layer.index]
            own_keys[self.written] = key[:, :, 0].to(self.wide)
            own_values[self.written] = value[:, :, 0].to(self.wide)
            own_bias, prefix_bias = self._bias(layer.window, shared)
            query = query.to(self.wide)
            own, own_lse = _attention(
                query.reshape(live, kv_heads, shared, width),
                own_keys[:live, :, : self.longest_own],
                own_values[:live, :, : self.longest_own],
                own_bias,
                layer,
            )
            places, seats = self.rows_of_place.shape
            grouped = query.reshape(live, -1)
            if not self.dense:
                grouped = grouped.index_select(0, self.rows_of_place.view(-1))
            grouped = grouped.view(places, seats, kv_heads, shared, width).transpose(1, 2)
            out, lse = _attention(
                grouped.reshape(places, kv_heads, seats * shared, width),
                prefix_keys[self.places, :, : self.longest_prefix],
                prefix_values[self.places, :, : self.longest_prefix],
                prefix_bias,
                layer,
            )
            out, lse = (
                each.view(places, kv_heads, seats, -1).transpose(1, 2).reshape(places * seats, -1)
                for each in (out, lse)
            )
            if not self.dense:
                out, lse = out.index_select(0, self.seated), lse.index_select(0, self.seated)
            out, lse = out.view(own.shape), lse.view(own_lse.shape)
            joint = torch.lerp(out, own, torch.sigmoid(own_lse - lse).unsqueeze(-1))
            if layer.sinks is not None:
                sinks = layer.sinks.to(self.wide).view(1, kv_heads, shared)
                joint = joint * torch.sigmoid(torch.logaddexp(own_lse, lse) - sinks).unsqueeze(-1)
            return joint.view(live, 1, heads, -1)


class _Prefill(SharedPrefixAttention):
    """Prompts side by side, each seeing itself; their keys and values go to the flight as they are made."""

    def __init__(self, flight: _Flight, places: Sequence[int], lengths: Sequence[int]) -> None:
        super().__init__([(length, ()) for length in lengths])
        self.flight, self.places, self.lengths = flight, places, lengths

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        self.flight.keep(layer, (key[0], value[0]), self.places, self.lengths)
        return super().attend(layer, query, key, value)


def _attention(
    query: Float[Tensor, "B heads Q D"],
    keys: Float[Tensor, "B heads K D"],
    values: Float[Tensor, "B heads K E"],
    bias: Float[Tensor, "..."] | None,
    layer: Layer,
) -> tuple[Float[Tensor, "B heads Q E"], Float[Tensor, "B heads Q"]]:
    """Attention and the log-sum-exp of its scores, by torch's kernel where that gives both and is the quicker way."""
    plain = layer.softcap is None and query.shape[-1] == values.shape[-1]
    if plain and query.device.type == "cpu" and query.shape[2] > FEW_QUERIES:
        mask = None if bias is None else bias.expand(len(query), 1, query.shape[2], keys.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=layer.scale
        )
        return out, lse
    scores = soft_capped((query * layer.scale) @ keys.transpose(-1, -2), layer.softcap)
    if bias is not None:
        scores += bias
    weights = torch.softmax(scores, dim=-1)
    # The log-sum-exp at the likeliest key, whose weight is at least 1 / keys.
    return weights @ values, scores.amax(dim=-1) - weights.amax(dim=-1).log_()
