"""Estimates of the KL divergence between policy and reference."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kl_estimate(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."], kind: str) -> Float[Tensor, "..."]:
    """Estimate of KL per token from one sample, in nats, always >= 0; d = log π_ref - log π_θ.

    k3 = exp(d) - d - 1 (DeepSeekMath Eq. 4): its expected value under π_θ is KL(π_θ‖π_ref), its expected gradient,
    samples fixed, that of KL(π_ref‖π_θ).
    k2 = ½ d² (Schulman 2020): its expected gradient is that of KL(π_θ‖π_ref).
    k1 = -d has no expected gradient, so it has no place in a loss: ValueError.
    """
    difference = ref_logprobs - logprobs
    if kind == "k3":
        return torch.expm1(difference) - difference
    if kind == "k2":
        return difference.square() / 2
    raise ValueError(f'kind = {kind!r}: k1 has an expected gradient of 0 in a loss; write "k2" or "k3"')
