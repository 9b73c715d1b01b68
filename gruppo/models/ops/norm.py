"""RMS norm and its gradient, with the residual addition fused in."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.models.ops.cpu.bindings import int64, kernels_for, new_tensor, pointer, thread_count


def add_norm(
    hidden: Float[Tensor, "N H"],
    delta: Float[Tensor, "N H"] | None,
    weight: Float[Tensor, " H"] | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "N H"], Float[Tensor, "N H"] | None]:
    """The sum x = hidden + delta, and its RMS norm, weight · x / √(mean x² + ε).

    `hidden`, `weight` and the sum are in the accumulation dtype. `delta` and the norm are in the compute dtype, which
    is `dtype`. Without a delta the sum is `hidden` itself; without a weight the norm is None.
    """
    kernels = kernels_for(dtype, narrow=[delta], wide=[hidden, weight])
    if kernels is not None:
        total = hidden if delta is None else torch.empty_like(hidden)
        normed = None if weight is None else new_tensor(*hidden.shape, dtype=dtype)
        kernels.add_norm(
            *map(int64, hidden.shape), pointer(hidden), pointer(delta), pointer(weight), ctypes.c_float(epsilon),
            pointer(total), pointer(normed), thread_count(),
        )  # fmt: skip
        return total, normed
    total = hidden if delta is None else hidden + delta
    return total, None if weight is None else norm(total, weight, epsilon).to(dtype)


def norm(rows: Float[Tensor, "... H"], weight: Float[Tensor, " H"], epsilon: float) -> Float[Tensor, "... H"]:
    """RMS norm in the accumulation dtype: weight · x / √(mean x² + ε)."""
    x = rows.to(torch.promote_types(rows.dtype, weight.dtype))
    return (x * weight).mul_(_inverse_size(x, epsilon))


def _inverse_size(rows: Tensor, epsilon: float) -> Tensor:
    """1 / √(mean x² + ε) for each row."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return sizes.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()


def norm_backward(
    grad: Float[Tensor, "*N H"],
    rows: Float[Tensor, "*N H"],
    weight: Float[Tensor, " H"],
    epsilon: float,
    more: Float[Tensor, "*N H"] | None = None,
) -> tuple[Float[Tensor, "*N H"], Float[Tensor, " H"]]:
    """The gradients of the rows, plus `more`, and of the weight of an RMS norm; both in the accumulation dtype.

    With s = 1 / √(mean x² + ε) and n = x · s, they are s · (g · w - n · mean(g · w · n)) and Σ g · n over the rows.
    """
    kernels = kernels_for(grad.dtype, narrow=[grad], wide=[rows, weight, more])
    if kernels is not None and rows.ndim == 2:
        of_rows, threads = torch.empty_like(rows), torch.get_num_threads()
        parts = new_tensor(threads, rows.shape[1])
        kernels.norm_backward(
            *map(int64, rows.shape), pointer(grad), pointer(rows), pointer(weight), ctypes.c_float(epsilon),
            pointer(more), pointer(of_rows), pointer(parts), ctypes.c_int(threads),
        )  # fmt: skip
        return of_rows, parts.sum(dim=0)
    x, grad = rows.to(weight.dtype), grad.to(weight.dtype)
    scale = _inverse_size(x, epsilon)
    normed = x * scale
    joint = grad * normed
    of_weight = joint.flatten(0, -2).sum(dim=0)
    share = (joint @ weight).div_(weight.numel()).unsqueeze(-1)
    of_rows = torch.mul(grad, weight, out=joint).addcmul_(normed, share, value=-1).mul_(scale)
    return (of_rows if more is None else of_rows.add_(more)), of_weight
