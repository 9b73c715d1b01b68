"""gruppo's own attention, plugged into transformers' modules through their attention interface.

A *plan* says which tokens see which. While a plan is active the model's attention calls go to it; outside, the model
is as transformers made it. The plan is one object for the whole process (autograd runs backward on threads of its
own on some devices, so it cannot be a thread's).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "gruppo"


class AttentionPlan(Protocol):
    """Computes attention for one layer."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "B heads T D"],
        key: Float[Tensor, "B kv_heads T D"],
        value: Float[Tensor, "B kv_heads T D"],
        scale: float,
    ) -> Float[Tensor, "B T heads D"]:
        """Attention output of every token."""


_active: AttentionPlan | None = None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert _active is not None, "the attention of gruppo is set but no plan is active"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if query.device.type != "cpu":
        return _active.attend(layer, query, key, value, scale), None
    # torch's attention on a CPU is quicker in float32 than in bfloat16, forward and backward.
    with torch.autocast("cpu", enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        return _active.attend(layer, query.to(wide), key.to(wide), value.to(wide), scale), None


AttentionInterface.register(NAME, _attention)


@contextmanager
def attention_plan(model: PreTrainedModel, plan: AttentionPlan) -> Iterator[None]:
    """Let `plan` do the attention of `model` inside the block; plans do not nest."""
    global _active
    assert _active is None, "an attention plan is active already"
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    _active = plan
    try:
        yield
    finally:
        _active = None
        model.config._attn_implementation = before


class SharedPrefixAttention:
    """Attention over a packed row of groups, each laid out as prompt, completion 1, …, completion n.

    A prompt token sees its prompt up to itself; a completion token sees the whole prompt of its group and its own
    completion up to itself, and nothing else. A group without completions is a plain causal sequence.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """`groups`: for each, the length of its prompt (>= 1) and of its completions (>= 1), in tokens."""
        self.groups = [(prompt, tuple(completions)) for prompt, completions in groups]
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output, start = [], 0
        for prompt, completions in self.groups:
            middle, end = start + prompt, start + prompt + sum(completions)
            q, k, v = (tensor[start:middle].transpose(0, 1)[None] for tensor in (query, key, value))
            shared = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            output.append(shared[0].transpose(0, 1))
            if completions:
                own = slice(middle, end)
                output.append(self._completions(query[own], key[own], value[own], k, v, completions, scale))
            start = end
        return torch.cat(output)[None]

    def _completions(
        self, query: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        """Query heads that share a key head are laid one after another, so that keys are not repeated for them."""
        kv_heads, prompt, width = k.shape[1:]
        count, longest, shared = len(lengths), max(lengths), query.shape[1] // kv_heads
        q = _pad(query, lengths).reshape(count, longest, kv_heads, shared, width)
        q = q.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, shared * longest, width)
        k = torch.cat([k.expand(count, -1, -1, -1), _pad(key, lengths).transpose(1, 2)], dim=2)
        v = torch.cat([v.expand(count, -1, -1, -1), _pad(value, lengths).transpose(1, 2)], dim=2)
        mask = self._mask(prompt, longest, shared, query.device)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.view(count, kv_heads, shared, longest, width).permute(0, 3, 1, 2, 4)
        return _unpad(out.reshape(count, longest, kv_heads * shared, width), lengths)

    def _mask(self, prompt: int, longest: int, shared: int, device: torch.device) -> Tensor:
        if (prompt, longest, shared) not in self._masks:
            own = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
            sees = torch.cat([own.new_ones(longest, prompt), own], dim=1)
            self._masks[prompt, longest, shared] = sees.repeat(shared, 1)
        return self._masks[prompt, longest, shared]


class CapturingAttention(SharedPrefixAttention):
    """The same, keeping every layer's keys and values: for the prompts that completions will share."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        super().__init__(groups)
        self.captured: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        self.captured[layer] = (key[0], value[0])
        return super().attend(layer, query, key, value, scale)


def _pad(tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packed [Σ lengths, …] to [len(lengths), max, …], zeros behind each end."""
    if len(set(lengths)) == 1:
        return tokens.reshape(len(lengths), lengths[0], *tokens.shape[1:])
    padded: Tensor = _Pad.apply(tokens, lengths)  # type: ignore[no-untyped-call]
    return padded


def _unpad(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The inverse of `_pad`."""
    if len(set(lengths)) == 1:
        return rows.flatten(0, 1)
    packed: Tensor = _Unpad.apply(rows, lengths)  # type: ignore[no-untyped-call]
    return packed


def _spread(tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    rows = tokens.new_zeros(len(lengths), max(lengths), *tokens.shape[1:])
    for row, part in zip(rows, tokens.split(list(lengths)), strict=True):
        row[: len(part)] = part
    return rows


def _gather(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.lengths = lengths
        return _spread(tokens, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.lengths), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.lengths = lengths
        return _gather(rows, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.lengths), None
