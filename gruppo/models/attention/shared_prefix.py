"""The CPU's attention over packed groups whose completions share a prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gruppo.errors import UsageError
from gruppo.models.attention.interface import Layer, soft_capped
from gruppo.models.attention.sequences import Layout
from gruppo.models.ops.attention import PackedLayout, attend_packed, attend_packed_backward

CPU = torch.device("cpu")


class SharedPrefixAttention:
    """Attention over a packed row of groups, each laid out as prompt, completion 1, …, completion n.

    A prompt token sees its prompt up to itself. A completion token sees the prompt of its group and its own completion
    up to itself. Nothing else is seen. A group without completions is a plain causal sequence.

    This is the CPU's attention: C kernels, or torch's kernel group by group. It is in float32, in which torch's kernel
    for a CPU is faster than in bfloat16, forward and backward.
    """

    wide = True

    def __init__(self, groups: Layout, device: torch.device = CPU) -> None:
        """`groups`: for each group, the length of its prompt and of its completions, in tokens; all >= 1.

        Raises UsageError for a device that is not a CPU.
        """
        if device.type != "cpu":
            raise UsageError(f'model.attention = "cpu": is for a CPU, and the model is on {device.type}; write "auto"')
        self.groups = [(prompt, tuple(completions)) for prompt, completions in groups]
        self._layout = PackedLayout(self.groups)
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}
        self._places: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        if (layout := self.packing(layer, *rows)) is not None:
            packed: Tensor = _Packed.apply(*rows, layout, layer.scale, layer.window)  # type: ignore[no-untyped-call]
            return packed[None]
        sizes = [size for prompt, completions in self.groups for size in (prompt, sum(completions))]
        parts = zip(*(tensor.split(sizes) for tensor in rows), strict=True)
        output = []
        for prompt, suffix, (_, completions) in zip(parts, parts, self.groups, strict=False):
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in prompt)
            output.append(self._prompt(layer, q, k, v)[0].transpose(0, 1))
            if completions:
                output.append(self._completions(layer, suffix, k, v, completions))
        return torch.cat(output)[None]

    def packing(self, layer: Layer, *rows: Float[Tensor, "N heads D"]) -> PackedLayout | None:
        """The layout with which `attend_packed` computes this layer's attention of such rows; None if it cannot."""
        fits = layer.softcap is None and layer.sinks is None and self._layout.fits(*rows)
        return self._layout if fits else None

    def _prompt(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        plain = layer.softcap is None and layer.sinks is None and (layer.window is None or length <= layer.window)
        if plain:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)
        heads, kv_heads = q.shape[1], k.shape[1]
        q = q.reshape(1, kv_heads, heads // kv_heads * length, q.shape[-1])
        mask = self._mask(0, length, heads // kv_heads, layer.window, q.device)
        return attend_masked(layer, q, k, v, mask).reshape(1, heads, length, v.shape[-1])

    def _completions(
        self, layer: Layer, suffix: tuple[Tensor, ...], k: Tensor, v: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Attention of completions. Query heads that share a key head are stacked, so keys need not be repeated."""
        kv_heads, prompt, width = k.shape[1:]
        query, key, value = (self._pad(tensor, lengths) for tensor in suffix)
        count, longest, shared = len(lengths), max(lengths), query.shape[2] // kv_heads
        q = query.reshape(count, longest, kv_heads, shared, width)
        q = q.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, shared * longest, width)
        k = torch.cat([k.expand(count, -1, -1, -1), key.transpose(1, 2)], dim=2)
        v = torch.cat([v.expand(count, -1, -1, -1), value.transpose(1, 2)], dim=2)
        mask = self._mask(prompt, longest, shared, layer.window, query.device)
        out = attend_masked(layer, q, k, v, mask)
        out = out.view(count, kv_heads, shared, longest, v.shape[-1]).permute(0, 3, 1, 2, 4)
        return self._unpad(out.reshape(count * longest, kv_heads * shared, v.shape[-1]), lengths)

    def _pad(self, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Pad packed tokens [Σ lengths, …] to [len(lengths), max, …].

        The padding consists of other tokens. No token of the completion sees them, and their outputs are discarded.
        """
        if len(set(lengths)) > 1:
            tokens = _Pad.apply(tokens, *self._padding(lengths, tokens.device))  # type: ignore[no-untyped-call]
        return tokens.view(len(lengths), max(lengths), *tokens.shape[1:])

    def _unpad(self, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The inverse of `_pad`, from [len(lengths) · max, …]."""
        if len(set(lengths)) == 1:
            return rows
        packed: Tensor = _Unpad.apply(rows, *self._padding(lengths, rows.device))  # type: ignore[no-untyped-call]
        return packed

    def _padding(self, lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """For each padded position the token that is there, and for each token its padded position."""
        if lengths not in self._places:
            sizes = torch.tensor(lengths)[:, None]
            place = torch.arange(max(lengths))
            token = (sizes.cumsum(0) - sizes + place).clamp(max=sum(lengths) - 1)
            filled = (place < sizes).flatten().nonzero().flatten()
            self._places[lengths] = token.flatten().to(device), filled.to(device)
        return self._places[lengths]

    def _mask(self, prompt: int, longest: int, shared: int, window: int | None, device: torch.device) -> Tensor:
        """Mask of the positions of [prompt, completion] that completion tokens see, repeated `shared` times."""
        mask_key = prompt, longest, shared, window
        if mask_key not in self._masks:
            query = torch.arange(prompt, prompt + longest, device=device)[:, None]
            key = torch.arange(prompt + longest, device=device)
            sees = key <= query
            if window is not None:
                sees &= query - key < window
            self._masks[mask_key] = sees.repeat(shared, 1)
        return self._masks[mask_key]


def attend_masked(layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries laid out as [rows, kv_heads, shared · T, D]. `mask` says which keys each of them sees.

    Uses torch's kernel for layers without a cap or sinks.
    """
    if layer.softcap is None and layer.sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale)
    scores = soft_capped((q * layer.scale) @ k.transpose(-1, -2), layer.softcap).masked_fill(~mask, -torch.inf)
    if layer.sinks is None:
        return torch.softmax(scores, dim=-1) @ v
    rows, kv_heads, stacked, _ = scores.shape
    shared = len(layer.sinks) // kv_heads
    sinks = layer.sinks.to(scores.dtype).view(1, kv_heads, shared, 1)
    sinks = sinks.expand(rows, -1, -1, stacked // shared).reshape(rows, kv_heads, stacked, 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1] @ v


class _Packed(torch.autograd.Function):
    """See `gruppo.models.ops.attention.attend_packed`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None
    ) -> Tensor:
        tensors = query.contiguous(), key.contiguous(), value.contiguous()
        output, normalizer = attend_packed(*tensors, layout, scale, window)
        ctx.save_for_backward(*tensors, output, normalizer)
        ctx.rest = layout, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, normalizer = ctx.saved_tensors
        return *attend_packed_backward(grad.contiguous(), tensors, (output, normalizer), *ctx.rest), None, None, None


class _Pad(torch.autograd.Function):
    """Pad tokens. Padding has no gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_place: Tensor, place_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(place_of_token)
        return tokens.index_select(0, token_of_place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """Remove padding."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_place: Tensor, place_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(place_of_token)
        ctx.places = len(token_of_place)
        return rows.index_select(0, place_of_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        padded = grad.new_zeros(ctx.places, *grad.shape[1:])
        (place_of_token,) = ctx.saved_tensors
        return padded.index_copy_(0, place_of_token, grad), None, None
