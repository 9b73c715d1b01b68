"""Slow, plain versions of the kernels of accelerators, with gradients on a CPU, and of attention itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask
from torch.nn.functional import scaled_dot_product_attention

from gruppo.models.attention.backends import BACKENDS, Backend
from gruppo.models.attention.flex import BLOCK, FlexAttention
from gruppo.models.attention.interface import Layer
from gruppo.models.attention.varlen import Lengths, VarlenAttention

Groups = Sequence[tuple[int, Sequence[int]]]


def attention(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one sequence whose last queries are given; [heads, T, D] as the formula says."""
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    last = key.shape[1] - query.shape[1]
    outputs = []
    for t in range(query.shape[1]):
        first = 0 if layer.window is None else max(0, last + t + 1 - layer.window)
        scores = torch.einsum("hd,hkd->hk", query[:, t], key[:, first : last + t + 1]) * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        if layer.sinks is not None:
            scores = torch.cat([scores, layer.sinks.to(scores.dtype)[:, None]], dim=1)
        shares = torch.softmax(scores, dim=1)[:, : last + t + 1 - first]
        outputs.append(torch.einsum("hk,hke->he", shares, value[:, first : last + t + 1]))
    return torch.stack(outputs, dim=1)


def each_sequence_alone(groups: Groups, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What `AttentionPlan.attend` returns: every prompt, and every completion after its prompt, alone."""
    outputs, start = [], 0
    for prompt, completions in groups:
        before = slice(start, start + prompt)
        start += prompt
        outputs.append(attention(layer, query[0, :, before], key[0, :, before], value[0, :, before]))
        for length in completions:
            own = slice(start, start + length)
            k, v = (torch.cat([part[0, :, before], part[0, :, own]], dim=1) for part in (key, value))
            outputs.append(attention(layer, query[0, :, own], k, v))
            start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, layer: Layer) -> Tensor:
    """One call of torch's attention per sequence, or the formula where it has no soft cap or sinks."""
    outputs = []
    query_ends, key_ends = lengths.query_ends.tolist(), lengths.key_ends.tolist()
    assert max(b - a for a, b in pairwise(query_ends)) == lengths.longest_query
    assert max(b - a for a, b in pairwise(key_ends)) == lengths.longest_key
    for number in range(len(query_ends) - 1):
        q = query[query_ends[number] : query_ends[number + 1]].transpose(0, 1)
        k, v = (part[key_ends[number] : key_ends[number + 1]].transpose(0, 1) for part in (key, value))
        if layer.softcap is None and layer.sinks is None:
            position = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
            seen = (position >= 0) & (position < (layer.window or k.shape[1]))
            output = scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen, scale=layer.scale, enable_gqa=True
            )[0]
        else:
            output = attention(layer, q, k, v)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def seen_of(mask: BlockMask, tokens: int) -> Tensor:
    """Which keys each query sees [T, T], read as the kernel reads it: the mask's function in partial blocks only."""
    count = -(-tokens // BLOCK)
    blocks = torch.zeros(2, count, count, dtype=torch.bool)
    pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for kind, (numbers, indices) in enumerate(pairs):
        assert numbers is not None
        assert indices is not None
        for row in range(count):
            blocks[kind, row, indices[0, 0, row, : numbers[0, 0, row]].long()] = True
    assert not (blocks[0] & blocks[1]).any()
    partial, whole = (each.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:tokens, :tokens] for each in blocks)
    places, zero = torch.arange(tokens), torch.zeros((), dtype=torch.long)
    return whole | (partial & mask.mask_mod(zero, zero, places[:, None], places[None]))


def flex_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_aux: AuxRequest | None = None,
) -> Any:
    """FlexAttention by its definition, for each block of queries, with the keys that any of them sees."""
    assert block_mask is not None
    assert scale is not None
    shared = query.shape[1] // key.shape[1]
    assert enable_gqa == (shared > 1)
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    outputs, sums = [], []
    for queries, seen in zip(query.split(BLOCK, 2), seen_of(block_mask, query.shape[2]).split(BLOCK), strict=True):
        columns = seen.any(0).nonzero()[:, 0]
        scores = queries @ key[:, :, columns].transpose(-1, -2) * scale
        if score_mod is not None:
            scores = score_mod(scores, *torch.zeros(4, dtype=torch.long))
        scores = scores.masked_fill(~seen[:, columns], -torch.inf)
        outputs.append(torch.softmax(scores, dim=-1) @ value[:, :, columns])
        sums.append(scores.logsumexp(dim=-1))
    output = torch.cat(outputs, dim=2)
    return output if return_aux is None else (output, AuxOutput(lse=torch.cat(sums, dim=2)))


# The backends as on an accelerator, with the plain kernels in place of the fast ones.
ON_CPU = {
    "cpu": BACKENDS["cpu"],
    "sdpa": BACKENDS["sdpa"],
    "flex": Backend("flex", lambda groups, device: FlexAttention(groups, device, flex_kernel)),
    "varlen": Backend("varlen", lambda groups, device: VarlenAttention(groups, device, varlen_kernel)),
}
