"""Rotary embeddings (RoPE) of queries and keys, with the norms of query and key heads, and their gradient."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.models.ops.cpu.bindings import int64, kernels_for, new_tensor, pointer, thread_count
from gruppo.models.ops.norm import norm

Rope = tuple[Tensor, Tensor]  # cosines and sines [N, D]


QKNorm = tuple[Tensor | None, Tensor | None, float]  # weights of the norms of query and key heads, and ε


def apply_rope(
    projected: Float[Tensor, "N Q+2*K D"], queries: int, rope: Rope, norms: QKNorm, dtype: torch.dtype
) -> tuple[Float[Tensor, "N Q D"], Float[Tensor, "N K D"], Float[Tensor, "N K D"]]:
    """Split rows [queries, keys, values] into queries, keys and values in `dtype`, and apply rotary embeddings.

    Queries and keys are first normalized per head if `norms` has weights. Rotary embeddings map the two halves (a, b)
    of each head to (a · cos - b · sin, b · cos + a · sin). `queries`: the number of query heads Q.
    """
    rows, heads, width = projected.shape
    keys = (heads - queries) // 2
    kernels = kernels_for(projected.dtype, narrow=[projected], wide=[*rope, *norms[:2]])
    if kernels is not None and dtype == torch.float32:
        outputs = new_tensor(rows, queries, width), new_tensor(rows, keys, width), new_tensor(rows, keys, width)
        kernels.turn_heads(
            *map(int64, (rows, queries, keys, width)), pointer(projected), *map(pointer, (*rope, *norms[:2])),
            ctypes.c_float(norms[2]), *map(pointer, outputs), thread_count(),
        )  # fmt: skip
        return outputs
    both, value = projected[:, : queries + keys].to(dtype), projected[:, queries + keys :].to(dtype)
    if norms[0] is not None and norms[1] is not None:
        both = torch.cat([norm(both[:, :queries], norms[0], norms[2]), norm(both[:, queries:], norms[1], norms[2])], 1)
    cos, sin = (table.unsqueeze(1) for table in rope)
    half = width // 2
    rotated = both * cos
    rotated[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(both[..., :half], sin[..., half:])
    return rotated[:, :queries], rotated[:, queries:], value


def apply_rope_backward(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "N K D"],
    value: Float[Tensor, "N K D"],
    rope: Rope,
    dtype: torch.dtype,
) -> Float[Tensor, "N Q+2*K D"]:
    """The gradient of the `projected` rows of `apply_rope`, in `dtype`.

    `query`, `key` and `value` are the gradients of its results. If heads have norms, the result is the gradient of the
    outputs of these norms instead.
    """
    (rows, queries, width), keys = query.shape, key.shape[1]
    kernels = kernels_for(dtype, wide=[query, key, value, *rope])
    if kernels is not None:
        grad = new_tensor(rows, queries + 2 * keys, width, dtype=dtype)
        kernels.turn_heads_backward(
            *map(int64, (rows, queries, keys, width)), *map(pointer, (query, key, value, *rope, grad)), thread_count()
        )
        return grad
    cos, sin = (table.unsqueeze(1) for table in rope)
    both, half = torch.cat([query, key], dim=1), width // 2
    rotated = both * cos
    rotated[..., :half].addcmul_(both[..., half:], sin[..., half:])
    rotated[..., half:].addcmul_(both[..., :half], sin[..., :half], value=-1)
    return torch.cat([rotated.to(dtype), value.to(dtype)], dim=1)
