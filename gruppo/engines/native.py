"""The engine that drives the same transformers module that is being trained, in the same process.

Each prompt is computed once and its keys and values are shared by its completions. A decoding step runs one token of
every completion in flight; a slot whose completion ended takes the next one of the queue, and when the queue is empty
the last slot moves into the gap, so that slots 0..n-1 are always the live ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.attention import CapturingAttention
from gruppo.engines import Request, SamplingOptions
from gruppo.errors import RunError
from gruppo.machine import free_memory
from gruppo.models import LanguageModel
from gruppo.reporting import Advance
from gruppo.types import Completion, FinishReason

PREFILL_TOKENS = 4096
MAX_SLOTS = 256
MEMORY_SHARE = 0.2


def sample_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], temperature: float
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Draw a token a row from softmax(logits / temperature) by inverting its distribution function at `uniforms`.

    One uniform number in [0, 1) a row, and one pass over the logits: sums of blocks choose the block, then the sums
    within it the token. Returns the tokens and their log-probabilities (nats) under the distribution drawn from.
    With temperature 0 the likeliest token and its log-probability at temperature 1. A token of probability 0 is
    never drawn.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not temperature:
        likeliest = logits.max(dim=-1)
        return likeliest.indices, likeliest.values - logits.logsumexp(dim=-1)
    weights = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)
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


def _first_beyond(ends: Tensor, goal: Tensor) -> Tensor:
    """Index of the first of the rising `ends` that is more than `goal`; at most the last one that rises."""
    index = (ends <= goal[:, None]).sum(dim=-1)
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(index, last)


def choose_slots(policy: LanguageModel, prompt_tokens: int, max_tokens: int, wanted: int) -> int:
    """Completions in flight: as many as are wanted, as 256, and as a fifth of the free memory holds, at least 1.

    A slot holds the keys and values of one completion and, at worst, of a prompt of its own.
    """
    config = policy.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * width
    budget = MEMORY_SHARE * free_memory(policy.device)
    return max(1, min(MAX_SLOTS, wanted, int(budget / (per_token * (prompt_tokens + max_tokens)))))


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
        wanted = sum(len(request.streams) for request in requests)
        state = _Flight(self.policy, min(self.slots, wanted), min(self.slots, len(requests)), longest, options)
        queue = deque(enumerate(requests))
        with self.policy.precision():
            head = self.policy.head
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
        reason: FinishReason = "stop" if ended else "length"
        spoken = raw.tokens[:-1] if ended else raw.tokens
        return Completion(
            token_ids=tuple(raw.tokens),
            sampling_logprobs=tuple(raw.logprobs),
            mask=(True,) * len(raw.tokens),
            finish_reason=reason,
            policy_version=self.version,
            text=str(self.policy.tokenizer.decode(spoken, skip_special_tokens=True)),
        )


@dataclass(frozen=True, slots=True)
class _Raw:
    tokens: list[int]
    logprobs: list[float]


class _Flight:
    """The completions in flight: their keys and values, and where each stands. It is the attention plan of decoding.

    A row is a live slot. Keys and values are kept in float32 (float64 in proofs).
    """

    def __init__(
        self, policy: LanguageModel, slots: int, places: int, longest_prompt: int, options: SamplingOptions
    ) -> None:
        """`slots`: completions in flight; `places`: prompts whose keys and values are kept at a time."""
        self.policy, self.options, self.slots = policy, options, slots
        config, device = policy.model.config, policy.device
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.wide = torch.promote_types(policy.dtype, torch.float32)
        layers = config.num_hidden_layers
        own, prefix = (layers, slots, heads, options.max_tokens, width), (layers, places, heads, longest_prompt, width)
        self.own_keys, self.own_values = (torch.zeros(own, dtype=self.wide, device=device) for _ in range(2))
        self.prefix_keys, self.prefix_values = (torch.zeros(prefix, dtype=self.wide, device=device) for _ in range(2))
        self.prefix_lengths = np.zeros(places, dtype=np.int64)
        self.prefix_users = np.zeros(places, dtype=np.int64)
        self.live = 0
        self.owner: list[tuple[int, int]] = [(0, 0)] * slots
        self.prefix_of = np.zeros(slots, dtype=np.int64)
        self.length = np.zeros(slots, dtype=np.int64)
        self.tokens = np.zeros((slots, options.max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((slots, options.max_tokens))
        self.uniforms = np.zeros((slots, options.max_tokens))
        self.finished: dict[tuple[int, int], _Raw] = {}
        self.waiting: deque[tuple[int, int, tuple[int, ...], int, Tensor]] = deque()
        self.eos = np.array(policy.eos_ids)
        self._made = 0

    @property
    def free(self) -> int:
        return self.slots - self.live

    def made_since(self) -> int:
        """Tokens made since this was last asked."""
        made, self._made = self._made, 0
        return made

    def admit(self, queue: deque[tuple[int, Request]], head: Tensor) -> None:
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
        plan = CapturingAttention([(length, ()) for length in lengths])
        device = self.policy.device
        ids = torch.tensor([[token for _, request, _ in new for token in request.token_ids]], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        hidden = self.policy.hidden_states(ids, positions, plan)[0]
        ends = np.cumsum(lengths)
        for layer, (keys, values) in plan.captured.items():
            for (_, _, place), end, length in zip(new, ends, lengths, strict=True):
                self.prefix_keys[layer, place, :, :length] = keys[:, end - length : end]
                self.prefix_values[layer, place, :, :length] = values[:, end - length : end]
        last = hidden[torch.as_tensor(ends - 1, device=device)]
        for (index, request, place), length, state in zip(new, lengths, last, strict=True):
            self.prefix_lengths[place], self.prefix_users[place] = length, len(request.streams)
            for number, _ in enumerate(request.streams):
                self.waiting.append((index, number, tuple(request.streams[number]), place, state))

    def _seat(self, head: Tensor) -> None:
        """Give free slots to waiting completions and draw their first tokens."""
        first = self.live
        states = []
        while self.waiting and self.free:
            index, number, stream, place, state = self.waiting.popleft()
            row = self.live
            self.owner[row], self.prefix_of[row], self.length[row] = (index, number), place, 0
            if self.options.temperature:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(stream)))
                self.uniforms[row] = generator.random(self.options.max_tokens)
            states.append(state)
            self.live += 1
        if states:
            self._draw(torch.stack(states), np.arange(first, self.live), head)

    def decode(self, head: Tensor) -> None:
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

    def _draw(self, hidden: Tensor, rows: np.ndarray, head: Tensor) -> None:
        """Sample the next token of `rows` from their last hidden states, and retire what has ended."""
        logits = hidden.to(head.dtype) @ head.T
        position = self.length[rows]
        uniforms = torch.as_tensor(self.uniforms[rows, position], device=logits.device)
        tokens, logprobs = sample_tokens(logits, uniforms, self.options.temperature)
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
        ended = np.isin(drawn, self.eos) | (self.length[rows] == self.options.max_tokens)
        for row in rows[ended][::-1].tolist():
            self._retire(row)

    def _retire(self, row: int) -> None:
        """Keep what the row made and move the last live row into its slot."""
        length = int(self.length[row])
        self.finished[self.owner[row]] = _Raw(self.tokens[row, :length].tolist(), self.logprobs[row, :length].tolist())
        self.prefix_users[self.prefix_of[row]] -= 1
        self.live -= 1
        last = self.live
        if row == last:
            return
        self.owner[row] = self.owner[last]
        for array in (self.prefix_of, self.length, self.tokens, self.logprobs, self.uniforms):
            array[row] = array[last]
        used = int(self.length[row])
        for store in (self.own_keys, self.own_values):
            store[:, row, :, :used] = store[:, last, :, :used]

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
        self.places = torch.as_tensor(places, device=device)
        self.rows_of_place = torch.as_tensor(rows, device=device)
        self.place_of_row = torch.as_tensor(member, device=device)
        self.seat_of_row = torch.as_tensor(seat, device=device)
        self.longest_prefix, self.longest_own = int(lengths.max()), int(self.length[:live].max())
        self.prefix_bias = self._bias(lengths, self.longest_prefix)
        self.own_bias = self._bias(self.length[:live], self.longest_own)
        self.rows = torch.arange(live, device=device)
        self.position = torch.as_tensor(self.length[:live] - 1, device=device)

    def _bias(self, lengths: np.ndarray, longest: int) -> Tensor:
        """0 where a key stands, -inf behind the end: [rows, 1, 1, longest]."""
        seen = np.arange(longest) < lengths[:, None]
        bias = torch.zeros(seen.shape, dtype=self.wide)
        bias[torch.as_tensor(~seen)] = -torch.inf
        return bias[:, None, None, :].to(self.policy.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `AttentionPlan`; T = 1. Attention over the shared prompt and over the completion's own tokens, each
        normalised by itself, joined by their log-sum-exps."""
        with torch.autocast(self.policy.device.type, enabled=False):
            live, heads, _, width = query.shape
            kv_heads = key.shape[1]
            shared = heads // kv_heads
            self.own_keys[layer, self.rows, :, self.position] = key[:, :, 0].to(self.wide)
            self.own_values[layer, self.rows, :, self.position] = value[:, :, 0].to(self.wide)
            q = (query.to(self.wide) * scale).view(live, kv_heads, shared, width)
            own, own_lse = _softmax_attention(
                q,
                self.own_keys[layer, :live, :, : self.longest_own],
                self.own_values[layer, :live, :, : self.longest_own],
                self.own_bias,
            )
            places, seats = self.rows_of_place.shape
            grouped = q[self.rows_of_place].transpose(1, 2).reshape(places, kv_heads, seats * shared, width)
            out, lse = _softmax_attention(
                grouped,
                self.prefix_keys[layer, self.places, :, : self.longest_prefix],
                self.prefix_values[layer, self.places, :, : self.longest_prefix],
                self.prefix_bias,
            )
            out = out.view(places, kv_heads, seats, shared, width)[self.place_of_row, :, self.seat_of_row]
            lse = lse.view(places, kv_heads, seats, shared, 1)[self.place_of_row, :, self.seat_of_row]
            joint = torch.lerp(out, own, torch.sigmoid(own_lse - lse))
            return joint.view(live, 1, heads, width)


def _softmax_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = query @ keys.transpose(-1, -2) + bias
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - lse).exp_() @ values, lse
