"""Sampling of one token per row of logits."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.models.ops.cpu.bindings import int64, kernels_for, new_tensor, pointer, thread_count


def sample(
    logits: Float[Tensor, "N V"], temperature: float, uniforms: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]] | None:
    """Sample one token per row from softmax(logits / temperature), by inverting its distribution function.

    `uniforms` has one float64 number in [0, 1) per row. Returns the tokens and their log-probabilities (nats; NaN if
    the logits are not finite), or None if no kernel supports the input.
    """
    kernels = kernels_for(logits.dtype, narrow=[logits])
    if kernels is None or uniforms.dtype != torch.float64:
        return None
    uniforms = uniforms.cpu().contiguous()
    assert len(uniforms) == len(logits)
    tokens, logprobs = new_tensor(len(logits), dtype=torch.int64), new_tensor(len(logits))
    kernels.sample(
        *map(int64, logits.shape), pointer(logits), ctypes.c_float(1 / temperature), pointer(uniforms), pointer(tokens),
        pointer(logprobs), thread_count(),
    )  # fmt: skip
    return tokens, logprobs
