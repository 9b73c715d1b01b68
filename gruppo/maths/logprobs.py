"""Token log-probabilities without the full logits, and estimators of the KL divergence.

Log-probabilities are of the full-vocabulary distribution at the sampling temperature, in nats.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    temperature: float,
    chunk_size: int = 512,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log π(target) and the entropy of π, where π = softmax(hidden · headᵀ / temperature), for N tokens.

    The logits are made for `chunk_size` tokens at a time and made again in backward, so memory holds
    chunk_size × V of them, never N × V. Products run in the dtype of `head`, everything after them in float32 (or
    float64). The entropy, in nats within [0, log V], carries no gradient. Both are empty for N = 0.
    """
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, temperature, chunk_size
    )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """∂ log π_t / ∂ logits = (onehot(t) - π) / temperature, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(head.dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=wide, device=hidden.device)
        entropy, normalisers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for chunk in _chunks(len(targets), chunk_size):
            logits = _logits(hidden[chunk], head, temperature)
            normaliser = torch.logsumexp(logits, dim=-1)
            logprobs[chunk] = logits.gather(-1, targets[chunk, None]).squeeze(-1) - normaliser
            probabilities = (logits - normaliser[:, None]).exp_()
            entropy[chunk] = normaliser - torch.linalg.vecdot(probabilities, logits)
            normalisers[chunk] = normaliser
        ctx.save_for_backward(hidden, head, targets, normalisers)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, normalisers = ctx.saved_tensors
        wide = normalisers.dtype
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device)
        for chunk in _chunks(len(targets), ctx.chunk_size):
            logits = _logits(hidden[chunk], head, ctx.temperature)
            scale = (grad[chunk] / ctx.temperature)[:, None]
            grad_logits = logits.sub_(normalisers[chunk, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(-1, targets[chunk, None], scale.to(wide))
            narrow = grad_logits.to(head.dtype)
            grad_hidden[chunk] = (narrow @ head).to(hidden.dtype)
            grad_head += narrow.T @ hidden[chunk].to(head.dtype)
        return grad_hidden, grad_head.to(head.dtype), None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(head.dtype, torch.float32)
    return (hidden.to(head.dtype) @ head.T).to(wide).div_(temperature)


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
