"""Losses as functions of per-token tensors and token weights.

`weights` contains all of an objective's averaging (1/P · 1/G · 1/|o_i| for DeepSeekMath Eq. 3). It is computed over the
*global* batch, so the losses of micro-batches add up to the same loss for any partition into micro-batches. "GC" is the
gradient coefficient of DeepSeekMath Eq. 5: the factor of ∇ log π_θ of a token, before weighting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.algorithms.kl import kl_estimate


class PolicyLoss(NamedTuple):
    """The loss and its parts, one value per token. Only `loss` has a gradient.

    `ratio`: ρ = π_θ/π_old. `clipped_low`: ρ < 1 - clip_low and Â < 0. `clipped_high`: ρ > 1 + clip_high and Â > 0. The
    `clipped` surrogate has no gradient at these tokens. `kl`: the KL estimate in nats, 0 without a KL term.
    """

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
    """min(ρÂ, clip(ρ, 1-ε_low, 1+ε_high) Â): DeepSeekMath Eq. 3; GSPO Eq. 5 with sequence ratios. GC at ρ = 1: Â."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped_weight(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, " N"]:
    """sg[clip(ρ, 1-ε_low, 1+ε_high)] Â log π_θ: CISPO (arXiv 2506.13585) Eq. 4-5; sg stops the gradient.

    GC: the clipped ρ times Â. No token loses its gradient to clipping.
    """
    return ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logprobs


def log_likelihood(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, " N"]:
    """Â log π_θ: REINFORCE, as in RLOO (arXiv 2402.14740). GC: Â. Uses neither the ratio nor the clips."""
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
    kl_importance: bool = False,
) -> PolicyLoss:
    """Negated GRPO objective (DeepSeekMath Eq. 3, with the KL of Eq. 4), summed over the N tokens of a micro-batch.

        -Σ_t w_t [ c_t · f(ρ_t, Â_t) - β · KL_t ],   ρ = π_θ/π_old,   f = `surrogate`, by default min(ρÂ, clip(ρ) Â)

    Log-probabilities are in nats; all tensors have one value per token. `weights` w contains the averaging.

    `sequences`: the completion index of each token. If given, ρ is the ratio of the completion: exp of the mean
    log-ratio over its tokens (GSPO Eq. 7). A completion must not be split over micro-batches. `importance`: the factor
    c_t, 1 if not given. `kl_coef`: β. `kl_importance`: KL_t is multiplied by ρ_t, with its gradient (DeepSeek-V3.2,
    arXiv 2512.02556: k3 then has the gradient of the KL), and `kl` is the product.

    A token of weight 0 is left out by selection, so its values, even NaN, affect neither the loss nor the gradient.
    At ρ = 1, ∂J/∂logprobs is w (Â + β(π_ref/π_θ - 1)), DeepSeekMath Eq. 21.

    Raises ValueError unless 0 <= clip_low <= 1 and clip_high >= 0, and if kl_coef > 0 without `ref_logprobs`.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low = {clip_low}: must be between 0 and 1")
    if clip_high < 0:
        raise ValueError(f"clip_high = {clip_high}: must be at least 0")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef}: needs ref_logprobs; pass them, or set kl_coef to 0")
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
        kl = kl * ratio if kl_importance else kl
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
    """½ Σ_t w_t max((V_t - R_t)², (V_old + clip(V_t - V_old, ±c) - R_t)²): the value loss of PPO, c = `clip`.

    All tensors have one value per token. c = 0 turns clipping off. A token of weight 0 is left out by selection. Raises
    ValueError for a negative clip.
    """
    if clip < 0:
        raise ValueError(f"clip = {clip}: must be at least 0; 0 turns clipping off")
    used = weights != 0
    error = torch.where(used, values - returns, 0.0)
    squares = error.square()
    if clip:
        clipped_values = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.maximum(squares, torch.where(used, clipped_values - returns, 0.0).square())
    return 0.5 * (weights * squares).sum()


def reward_model_loss(
    scores: Float[Tensor, " K"], labels: Float[Tensor, " K"], weights: Float[Tensor, " K"]
) -> Float[Tensor, ""]:
    """-Σ_k w_k [y_k log σ(s_k) + (1 - y_k) log(1 - σ(s_k))]: binary cross-entropy of a reward model.

    Outcome reward models have one score s per completion, process reward models one at the end of each step
    (Math-Shepherd, arXiv 2312.08935, Eq. 2). Labels y are between 0 and 1, hard or soft. The derivative with respect to
    s is w (σ(s) - y). With K = 0 the loss is 0. Raises ValueError for labels outside of this range.
    """
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(f"labels = {labels.tolist()[:20]}: must be between 0 and 1")
    return (weights * (torch.nn.functional.softplus(scores) - labels * scores)).sum()


class DPOLoss(NamedTuple):
    """One value per pair: the loss, and its derivative with respect to Δ⁻, the gradient coefficient (GC) of DPO."""

    loss: Float[Tensor, " K"]
    coefficient: Float[Tensor, " K"]


def dpo_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], beta: float) -> DPOLoss:
    """-log σ(β (Δ⁺ - Δ⁻)) for K pairs of a chosen completion o⁺ and a rejected completion o⁻ (DPO).

    Δ is log π_θ - log π_ref of a completion in nats, `chosen` Δ⁺ and `rejected` Δ⁻: averaged over the tokens of the
    completion in DeepSeekMath Eq. 12, summed in the usual form.

    The GC is β σ(β (Δ⁻ - Δ⁺)) for each token of o⁺ and its negative for each token of o⁻, divided by |o| if Δ is
    averaged. DeepSeekMath Eq. 14 omits the factor β. Raises ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta}: must be greater than 0")
    margin = beta * (chosen - rejected)
    return DPOLoss(torch.nn.functional.softplus(-margin), beta * torch.sigmoid(-margin))


def sequence_means(
    values: Float[Tensor, " N"], used: Bool[Tensor, " N"], sequences: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """For each token, the mean of `values` over the used tokens of its sequence; 0 if the sequence has none."""
    count = len(sequences)  # at least the number of sequences, which would have to be read from the device
    sums = values.new_zeros(count).index_add(0, sequences, torch.where(used, values, 0.0))
    lengths = values.new_zeros(count).index_add(0, sequences, used.to(values.dtype))
    return (sums / lengths.clamp(min=1))[sequences]
