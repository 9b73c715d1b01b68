"""The gate of a feed-forward layer and its gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from gruppo.models.ops.cpu.bindings import int64, kernels_for, pointer, thread_count


def gate(gated: Float[Tensor, "N 2*I"]) -> Float[Tensor, "N I"]:
    """silu(gate) · up of rows [gate, up], narrow."""
    rows, size = len(gated), gated.shape[1] // 2
    kernels = kernels_for(gated.dtype, narrow=[gated])
    if kernels is not None:
        made = gated.new_empty(rows, size)
        kernels.gate(int64(rows), int64(size), pointer(gated), pointer(made), thread_count())
        return made
    first, second = gated.chunk(2, dim=-1)
    return silu(first).mul_(second)


def gate_backward(gated: Float[Tensor, "N 2*I"], grad: Float[Tensor, "N I"]) -> Float[Tensor, "N 2*I"]:
    """The gradient of `gate` with respect to its rows, narrow."""
    kernels = kernels_for(gated.dtype, narrow=[gated, grad])
    made = torch.empty_like(gated)
    if kernels is not None:
        kernels.gate_backward(*map(int64, grad.shape), pointer(gated), pointer(grad), pointer(made), thread_count())
        return made
    first, second = gated.chunk(2, dim=-1)
    size = first.shape[-1]
    torch.mul(grad, silu(first), out=made[:, size:])
    torch.ops.aten.silu_backward.grad_input(grad * second, first, grad_input=made[:, :size])
    return made
