"""Losses: functions of per-token tensors, with the weight of every token given from outside.

`weights` carries the whole of an objective's averaging (for Eq. 3 of DeepSeekMath 1/P · 1/G · 1/|o_i|), computed over
the *global* batch, so that a sum over any partition into micro-batches is the same loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.maths.logprobs import kl_estimate


class PolicyLoss(NamedTuple):
    """The loss, and what it was made of, a number a token; only `loss` carries a gradient."""

    loss: Float[Tensor, ""]
    ratio: Float[Tensor, " N"]
    clipped_low: Bool[Tensor, " N"]
    clipped_high: Bool[Tensor, " N"]
    kl: Float[Tensor, " N"]


def policy_loss(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    weights: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
    ref_logprobs: Float[Tensor, " N"] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> PolicyLoss:
    """GRPO objective, negated (DeepSeekMath Eq. 3, KL of Eq. 4), summed over the N tokens of a micro-batch.

    -Σ_t w_t [ min(ρÂ, clip(ρ, 1-ε_low, 1+ε_high) Â) - β·KL_t ],  ρ = π_θ/π_old

    Log-probabilities in nats. A token of weight 0 is left out by selection, so that whatever stands there, NaN
    included, reaches neither the loss nor the gradient. At ρ = 1 ∂J/∂logprobs is w (Â + β(π_ref/π_θ - 1)), Eq. 21.
    Raises ValueError unless 0 <= clip_low <= 1, clip_high >= 0, and ref_logprobs is given where kl_coef > 0.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low} must lie between 0 and 1")
    if clip_high < 0:
        raise ValueError(f"clip_high = {clip_high} must not be negative")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs; give them, or set kl_coef to 0")
    used = weights != 0
    logprobs = torch.where(used, logprobs, 0.0)
    ratio = torch.exp(logprobs - torch.where(used, old_logprobs, 0.0))
    advantages = torch.where(used, advantages, 0.0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(ratio)
    if kl_coef and ref_logprobs is not None:
        kl = kl_estimate(logprobs, torch.where(used, ref_logprobs, 0.0), kl_estimator)
        objective = objective - kl_coef * kl
    detached = ratio.detach()
    return PolicyLoss(
        loss=-(weights * objective).sum(),
        ratio=detached,
        clipped_low=(detached < 1 - clip_low) & (advantages < 0),
        clipped_high=(detached > 1 + clip_high) & (advantages > 0),
        kl=kl.detach(),
    )


def sequence_mean_weights(lengths: list[list[int]]) -> list[list[float]]:
    """Token weights of Eq. 3: w = 1/P · 1/G_p · 1/|o_i| for completion i of prompt p.

    `lengths[p]` holds the numbers of loss tokens of the *trained* completions of prompt p, over the whole batch of
    all processes. A prompt without any leaves P; an empty completion stays in G_p and has weight 0.
    """
    prompts = sum(bool(group) for group in lengths)
    return [[1 / (prompts * len(group) * length) if length else 0.0 for length in group] for group in lengths]
