"""SwiGLU, the activation of the feed-forward layer, and its gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from gruppo.models.ops.cpu.bindings import int64, kernels_for, pointer, thread_count


def gate(gated: Float[Tensor, "N 2*I"]) -> Float[Tensor, "N I"]:
    """SwiGLU: silu(gate) · up for rows [gate, up], in the compute dtype."""
    rows, size = len(gated), gated.shape[1] // 2
    kernels = kernels_for(gated.dtype, narrow=[gated])
    if kernels is not None:
        result = gated.new_empty(rows, size)
        kernels.gate(int64(rows), int64(size), pointer(gated), pointer(result), thread_count())
        return result
    first, second = gated.chunk(2, dim=-1)
    return silu(first).mul_(second)


def gate_backward(gated: Float[Tensor, "N 2*I"], grad: Float[Tensor, "N I"]) -> Float[Tensor, "N 2*I"]:
    """The gradient of SwiGLU (`gate`) with respect to its rows, in the compute dtype."""
    kernels = kernels_for(gated.dtype, narrow=[gated, grad])
    of_rows = torch.empty_like(gated)
    if kernels is not None:
        kernels.gate_backward(*map(int64, grad.shape), pointer(gated), pointer(grad), pointer(of_rows), thread_count())
        return of_rows
    first, second = gated.chunk(2, dim=-1)
    size = first.shape[-1]
    torch.mul(grad, silu(first), out=of_rows[:, size:])
    torch.ops.aten.silu_backward.grad_input(grad * second, first, grad_input=of_rows[:, :size])
    return of_rows
