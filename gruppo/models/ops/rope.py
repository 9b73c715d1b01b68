"""Rotary positions of queries and keys, with the norms of heads, and their gradient."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.models.ops.cpu.bindings import int64, kernels_for, new_tensor, pointer, thread_count
from gruppo.models.ops.norm import norm

Rope = tuple[Tensor, Tensor]  # cosines and sines [N, D]


QKNorm = tuple[Tensor | None, Tensor | None, float]  # weights of the norms of each query's and key's head, and ε


def apply_rope(
    projected: Float[Tensor, "N Q+2*K D"], queries: int, rope: Rope, norms: QKNorm, dtype: torch.dtype
) -> tuple[Float[Tensor, "N Q D"], Float[Tensor, "N K D"], Float[Tensor, "N K D"]]:
    """Queries, keys and values of rows [queries, keys, values], in `dtype`: queries and keys normed where there are
    weights for it, then turned by their rotary positions: (a, b) -> (a · cos - b · sin, b · cos + a · sin) of the two
    halves of each head."""
    rows, heads, width = projected.shape
    keys = (heads - queries) // 2
    kernels = kernels_for(projected.dtype, narrow=[projected], wide=[*rope, *norms[:2]])
    if kernels is not None and dtype == torch.float32:
        made = new_tensor(rows, queries, width), new_tensor(rows, keys, width), new_tensor(rows, keys, width)
        kernels.turn_heads(
            *map(int64, (rows, queries, keys, width)), pointer(projected), *map(pointer, (*rope, *norms[:2])),
            ctypes.c_float(norms[2]), *map(pointer, made), thread_count(),
        )  # fmt: skip
        return made
    both, value = projected[:, : queries + keys].to(dtype), projected[:, queries + keys :].to(dtype)
    if norms[0] is not None and norms[1] is not None:
        both = torch.cat([norm(both[:, :queries], norms[0], norms[2]), norm(both[:, queries:], norms[1], norms[2])], 1)
    cos, sin = (each.unsqueeze(1) for each in rope)
    half = width // 2
    turned = both * cos
    turned[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(both[..., :half], sin[..., half:])
    return turned[:, :queries], turned[:, queries:], value


def apply_rope_backward(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "N K D"],
    value: Float[Tensor, "N K D"],
    rope: Rope,
    dtype: torch.dtype,
) -> Float[Tensor, "N Q+2*K D"]:
    """The gradient of the rows that `apply_rope` read, in `dtype`, from those of what it made; where heads have norms
    of their own, that of what those made."""
    (rows, queries, width), keys = query.shape, key.shape[1]
    kernels = kernels_for(dtype, wide=[query, key, value, *rope])
    if kernels is not None:
        made = new_tensor(rows, queries + 2 * keys, width, dtype=dtype)
        kernels.turn_heads_backward(
            *map(int64, (rows, queries, keys, width)), *map(pointer, (query, key, value, *rope, made)), thread_count()
        )
        return made
    cos, sin = (each.unsqueeze(1) for each in rope)
    both, half = torch.cat([query, key], dim=1), width // 2
    turned = both * cos
    turned[..., :half].addcmul_(both[..., half:], sin[..., half:])
    turned[..., half:].addcmul_(both[..., :half], sin[..., :half], value=-1)
    return torch.cat([turned.to(dtype), value.to(dtype)], dim=1)
