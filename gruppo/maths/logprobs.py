"""Token log-probabilities without the full logits, and estimators of the KL divergence.

Log-probabilities are of the full-vocabulary distribution at the sampling temperature, in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class OutputHead(NamedTuple):
    """What makes logits of hidden states: z = scale · (hidden · weightᵀ + bias), then softcap · tanh(z / softcap) where
    there is a cap."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Logits in float32 (or float64); the product runs in the dtype of `weight`."""
        logits = (hidden.to(self.weight.dtype) @ self.weight.T).to(self.wide)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything after the product."""
        return torch.promote_types(self.weight.dtype, torch.float32)


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: OutputHead,
    targets: Int[Tensor, " N"],
    temperature: float,
    chunk_size: int = 512,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log π(target) and the entropy of π, where π = softmax(logits / temperature), for N tokens.

    The logits are made for `chunk_size` tokens at a time and made again in backward, so memory holds
    chunk_size × V of them, never N × V. Products run in the dtype of the head, everything after them in float32 (or
    float64). The entropy, in nats within [0, log V], carries no gradient. Both are empty for N = 0.
    """
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, *head, targets, temperature, chunk_size
    )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """∂ log π_t / ∂ logits = (onehot(t) - π) / temperature, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        head = OutputHead(weight, bias, scale, softcap)
        logprobs = torch.empty(len(targets), dtype=head.wide, device=hidden.device)
        entropy, normalisers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for chunk in _chunks(len(targets), chunk_size):
            logits = head.logits(hidden[chunk]).div_(temperature)
            normaliser = torch.logsumexp(logits, dim=-1)
            logprobs[chunk] = logits.gather(-1, targets[chunk, None]).squeeze(-1) - normaliser
            probabilities = (logits - normaliser[:, None]).exp_()
            entropy[chunk] = normaliser - torch.linalg.vecdot(probabilities, logits)
            normalisers[chunk] = normaliser
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.scale, ctx.softcap, ctx.temperature, ctx.chunk_size = scale, softcap, temperature, chunk_size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        head = OutputHead(weight, bias, ctx.scale, ctx.softcap)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # of a frozen head: V × H numbers that nobody would read
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=head.wide, device=weight.device)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for chunk in _chunks(len(targets), ctx.chunk_size):
            logits = head.logits(hidden[chunk])
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
            scale = (grad[chunk] / ctx.temperature)[:, None]
            grad_logits = logits.div_(ctx.temperature).sub_(normalisers[chunk, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(-1, targets[chunk, None], scale.to(head.wide))
            if slope is not None:
                grad_logits *= slope
            if head.scale != 1:
                grad_logits *= head.scale
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            narrow = grad_logits.to(weight.dtype)
            grad_hidden[chunk] = (narrow @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden[chunk].to(weight.dtype)
        narrowed = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, narrowed, grad_bias, None, None, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


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
