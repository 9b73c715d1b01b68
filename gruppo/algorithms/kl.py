"""Estimators of the KL divergence between policy and reference."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kl_estimate(logprobs: Float[Tensor, "..."], ref_logprobs: Float[Tensor, "..."], kind: str) -> Float[Tensor, "..."]:
    """Per-token estimate of the KL divergence from one sample, in nats, always >= 0. Let d = log π_ref - log π_θ.

    "k3" = exp(d) - d - 1 (DeepSeekMath Eq. 4). Its expected value under π_θ is KL(π_θ‖π_ref). Its expected gradient,
    with the samples held fixed, is the gradient of KL(π_ref‖π_θ).

    "k2" = ½ d² (Schulman 2020). Its expected gradient is the gradient of KL(π_θ‖π_ref).

    "k1" = -d has an expected gradient of 0, so it cannot be a loss term. Raises ValueError for it and for any other
    `kind`.
    """
    difference = ref_logprobs - logprobs
    if kind == "k3":
        return torch.expm1(difference) - difference
    if kind == "k2":
        return difference.square() / 2
    raise ValueError(f'kind = {kind!r}: k1 has an expected gradient of 0 in a loss; write "k2" or "k3"')
