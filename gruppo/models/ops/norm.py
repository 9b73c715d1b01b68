"""RMS norms and their gradients."""

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
    """The sum x = hidden + delta (hidden itself without a delta), wide; and weight · x / √(mean x² + ε), narrow, where
    there is a weight. `dtype` is the narrow one, which the delta has."""
    kernels = kernels_for(dtype, narrow=[delta], wide=[hidden, weight])
    if kernels is not None:
        made = hidden if delta is None else torch.empty_like(hidden)
        normed = None if weight is None else new_tensor(*hidden.shape, dtype=dtype)
        kernels.add_norm(
            *map(int64, hidden.shape), pointer(hidden), pointer(delta), pointer(weight), ctypes.c_float(epsilon), pointer(made),
            pointer(normed), thread_count(),
        )  # fmt: skip
        return made, normed
    made = hidden if delta is None else hidden + delta
    return made, None if weight is None else norm(made, weight, epsilon).to(dtype)


def norm(rows: Float[Tensor, "... H"], weight: Float[Tensor, " H"], epsilon: float) -> Float[Tensor, "... H"]:
    """RMS norm, wide: weight · x / √(mean x² + ε)."""
    wide = rows.to(torch.promote_types(rows.dtype, weight.dtype))
    return (wide * weight).mul_(_inverse_size(wide, epsilon))


def _inverse_size(rows: Tensor, epsilon: float) -> Tensor:
    """1 / √(mean x² + ε) of each row."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return sizes.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()


def norm_backward(
    grad: Float[Tensor, "*N H"],
    rows: Float[Tensor, "*N H"],
    weight: Float[Tensor, " H"],
    epsilon: float,
    more: Float[Tensor, "*N H"] | None = None,
) -> tuple[Float[Tensor, "*N H"], Float[Tensor, " H"]]:
    """The gradient of a norm's rows, plus `more`, and that of its weight; both wide.

    With s = 1 / √(mean x² + ε) and n = x · s: s · (g · w - n · mean(g · w · n)), and Σ g · n over the rows.
    """
    kernels = kernels_for(grad.dtype, narrow=[grad], wide=[rows, weight, more])
    if kernels is not None and rows.ndim == 2:
        made, threads = torch.empty_like(rows), torch.get_num_threads()
        parts = new_tensor(threads, rows.shape[1])
        kernels.norm_backward(
            *map(int64, rows.shape), pointer(grad), pointer(rows), pointer(weight), ctypes.c_float(epsilon), pointer(more), pointer(made),
            pointer(parts), ctypes.c_int(threads),
        )  # fmt: skip
        return made, parts.sum(dim=0)
    wide, grad = rows.to(weight.dtype), grad.to(weight.dtype)
    scale = _inverse_size(wide, epsilon)
    normed = wide * scale
    joint = grad * normed
    of_weight = joint.flatten(0, -2).sum(dim=0)
    share = (joint @ weight).div_(weight.numel()).unsqueeze(-1)
    made = torch.mul(grad, weight, out=joint).addcmul_(normed, share, value=-1).mul_(scale)
    return (made if more is None else made.add_(more)), of_weight
