"""Losses: functions of per-token tensors, with the weight of every token given from outside.

`weights` carries the whole of an objective's averaging (for Eq. 3 of DeepSeekMath 1/P · 1/G · 1/|o_i|), computed over
the *global* batch, so that a sum over any partition into micro-batches is the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.algorithms.kl import kl_estimate


class PolicyLoss(NamedTuple):
    """The loss, and what it was made of, a number a token; only `loss` carries a gradient."""

    loss: Float[Tensor, ""]
    ratio: Float[Tensor, " N"]
    clipped_low: Bool[Tensor, " N"]
    clipped_high: Bool[Tensor, " N"]
    kl: Float[Tensor, " N"]


Surrogate = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]


def clipped(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, " N"]:
    """min(ρÂ, clip(ρ, 1-ε_low, 1+ε_high) Â): DeepSeekMath Eq. 3; with a sequence's ratio GSPO Eq. 5. GC at ρ = 1: Â."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped_weight(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, " N"]:
    """sg[clip(ρ, 1-ε_low, 1+ε_high)] Â log π_θ: CISPO (arXiv 2506.13585) Eq. 4-5. GC: the clipped ρ times Â, so that no
    token loses its gradient."""
    return ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logprobs


def log_likelihood(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, " N"]:
    """Â log π_θ: REINFORCE, as in RLOO (arXiv 2402.14740). GC: Â; neither ratio nor clip."""
    return advantages * logprobs


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
    surrogate: Surrogate = clipped,
    sequences: Int[Tensor, " N"] | None = None,
    importance: Float[Tensor, " N"] | None = None,
) -> PolicyLoss:
    """GRPO objective, negated (DeepSeekMath Eq. 3, KL of Eq. 4), summed over the N tokens of a micro-batch.

    -Σ_t w_t [ c_t · f(ρ_t, Â_t) - β·KL_t ],  ρ = π_θ/π_old,  f = `surrogate`, by default min(ρÂ, clip(ρ) Â)

    `sequences`: the number of each token's completion; then ρ is that completion's, exp of the mean of its tokens'
    log-ratios (GSPO Eq. 7; a completion must be whole). `importance`: c, a factor a token, 1 where not given.
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
    log_ratio = logprobs - torch.where(used, old_logprobs, 0.0)
    if sequences is not None:
        log_ratio = sequence_means(log_ratio, used, sequences)
    ratio = torch.exp(log_ratio)
    advantages = torch.where(used, advantages, 0.0)
    objective = surrogate(logprobs, ratio, advantages, clip_low, clip_high)
    if importance is not None:
        objective = objective * torch.where(used, importance, 0.0)
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


def value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    weights: Float[Tensor, " N"],
    clip: float,
) -> Float[Tensor, ""]:
    """½ Σ_t w_t max((V_t - R_t)², (V_old + clip(V_t - V_old, ±c) - R_t)²): PPO's value model; c = 0 clips nothing.

    A token of weight 0 is left out by selection. Raises ValueError for a negative clip.
    """
    if clip < 0:
        raise ValueError(f"clip = {clip} must not be negative")
    used = weights != 0
    error = torch.where(used, values - returns, 0.0)
    squares = error.square()
    if clip:
        held = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.maximum(squares, torch.where(used, held - returns, 0.0).square())
    return 0.5 * (weights * squares).sum()


def reward_model_loss(
    scores: Float[Tensor, " K"], labels: Float[Tensor, " K"], weights: Float[Tensor, " K"]
) -> Float[Tensor, ""]:
    """-Σ_k w_k [y_k log σ(s_k) + (1 - y_k) log(1 - σ(s_k))]: a reward model's, outcome (one s a completion) or process
    (one at the end of each step; Math-Shepherd, arXiv 2312.08935, Eq. 2).

    Labels y from 0 to 1, hard or soft. The derivative by s is w (σ(s) - y). Raises ValueError for other labels.
    """
    if len(labels) and not (float(labels.min()) >= 0 and float(labels.max()) <= 1):
        raise ValueError(f"labels = {labels.tolist()[:20]}: must lie between 0 and 1")
    return (weights * (torch.nn.functional.softplus(scores) - labels * scores)).sum()


class DPOLoss(NamedTuple):
    """A number a pair: the loss, and its derivative by Δ⁻, which is the gradient coefficient of DPO."""

    loss: Float[Tensor, " K"]
    coefficient: Float[Tensor, " K"]


def dpo_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], beta: float) -> DPOLoss:
    """-log σ(β (Δ⁺ - Δ⁻)) of K pairs: DPO, DeepSeekMath Eq. 12 (Δ averaged over a completion) or its usual form (Δ
    summed), where Δ is the completion's log π_θ - log π_ref in nats.

    GC on each token of o⁺ is β σ(β (Δ⁻ - Δ⁺)), on o⁻ its negative, over |o| where Δ is averaged; the paper's Eq. 14
    leaves out the factor β. Raises ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta} must be positive")
    margin = beta * (chosen - rejected)
    return DPOLoss(torch.nn.functional.softplus(-margin), beta * torch.sigmoid(-margin))


def sequence_means(
    values: Float[Tensor, " N"], used: Bool[Tensor, " N"], sequences: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The mean over the used tokens of each token's own sequence; 0 for a sequence without any."""
    count = int(sequences.max()) + 1 if len(sequences) else 0
    sums = values.new_zeros(count).index_add(0, sequences, torch.where(used, values, 0.0))
    lengths = values.new_zeros(count).index_add(0, sequences, used.to(values.dtype))
    return (sums / lengths.clamp(min=1))[sequences]
