"""Token log-probabilities without the full logits, and estimators of the KL divergence.

Log-probabilities are of the full-vocabulary distribution at the sampling temperature, in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.maths.products import product

CHUNK_SIZE, PART_SIZE = 1024, 4096  # tokens and entries of the vocabulary whose logits are held at a time


class OutputHead(NamedTuple):
    """What makes logits of hidden states: z = scale · (hidden · weightᵀ + bias), then softcap · tanh(z / softcap) where
    there is a cap.

    `master`: the parameter that `weight` is a copy of, in the dtype of products. The weight's gradient is then added to
    `master.grad` as soon as it is made, and `weight` has none.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    master: Tensor | None = None

    def logits(self, hidden: Float[Tensor, "N H"], part: slice = slice(None)) -> Float[Tensor, "N V"]:
        """Logits in float32 (or float64), of a part of the vocabulary; the product runs in the dtype of `weight`."""
        weight = self.weight if part == slice(None) else self.weight[part]
        logits = product(hidden, weight).to(self.wide)
        if self.bias is not None:
            logits += self.bias[part]
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
    chunk_size: int = CHUNK_SIZE,
    part_size: int = PART_SIZE,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log π(target) and the entropy of π, where π = softmax(logits / temperature), for N tokens.

    The logits are made for `chunk_size` tokens and `part_size` entries of the vocabulary at a time and made again in
    backward, so memory holds chunk_size × part_size of them, never N × V. Products run in the dtype of the head,
    everything after them in float32 (or float64). The entropy, in nats within [0, log V], carries no gradient. Both
    are empty for N = 0.
    """
    weight, bias, scale, softcap, master = head
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, scale, softcap, master, targets, temperature, chunk_size, part_size
    )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """∂ log π_t / ∂ logits = (onehot(t) - π) / temperature, part by part."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        master: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        part_size: int,
    ) -> tuple[Tensor, Tensor]:
        head = OutputHead(weight, bias, scale, softcap, master)
        logprobs = torch.empty(len(targets), dtype=head.wide, device=hidden.device)
        entropy, normalisers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        parts = _slices(len(weight), part_size)
        part_normalisers = logprobs.new_empty(len(targets), len(parts))
        for chunk in _slices(len(targets), chunk_size):
            rows, wanted = hidden[chunk].to(weight.dtype), targets[chunk, None]
            target = torch.zeros(len(rows), 1, dtype=head.wide, device=rows.device)
            means = []  # of the logits, by the probabilities within each part
            for number, part in enumerate(parts):
                logits = head.logits(rows, part).div_(temperature)
                _pick(target, logits, wanted - part.start)
                within = torch.softmax(logits, dim=-1)  # a quicker kernel than exp's
                part_normalisers[chunk, number] = logits.amax(dim=-1) - within.amax(dim=-1).log_()
                means.append(within.mul_(logits).sum(dim=-1))
            normaliser = part_normalisers[chunk].logsumexp(dim=-1)
            shares = (part_normalisers[chunk] - normaliser[:, None]).exp_()
            logprobs[chunk] = target[:, 0] - normaliser
            entropy[chunk] = normaliser - (shares * torch.stack(means, dim=-1)).sum(dim=-1)
            normalisers[chunk] = normaliser
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, part_normalisers)
        ctx.rest = scale, softcap, master, temperature, chunk_size, part_size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, part_normalisers = ctx.saved_tensors
        scale, softcap, master, temperature, chunk_size, part_size = ctx.rest
        head = OutputHead(weight, bias, scale, softcap, master)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, trained = _gradient(weight, master, ctx.needs_input_grad[1])
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for chunk in _slices(len(targets), chunk_size):
            rows, wanted = hidden[chunk].to(weight.dtype), targets[chunk, None]
            scales = (grad[chunk, None] / temperature).to(head.wide)
            grad_rows = torch.zeros(rows.shape, dtype=head.wide, device=rows.device)
            shares = (part_normalisers[chunk] - normalisers[chunk, None]).exp_().mul_(-scales)
            for number, part in enumerate(_slices(len(weight), part_size)):
                logits = head.logits(rows, part)
                slope = None if softcap is None else 1 - (logits / softcap).square_()
                grad_logits = torch.softmax(logits.div_(temperature), dim=-1).mul_(shares[:, number, None])
                _add_at(grad_logits, wanted - part.start, scales)
                if slope is not None:
                    grad_logits *= slope
                if scale != 1:
                    grad_logits *= scale
                if grad_bias is not None:
                    grad_bias[part] += grad_logits.sum(dim=0)
                narrow = grad_logits.to(weight.dtype)
                grad_rows += narrow @ weight[part]
                if trained:
                    grad_weight[part] += narrow.T @ rows
            grad_hidden[chunk] = grad_rows.to(hidden.dtype)
        returned = grad_weight.to(weight.dtype) if trained and master is None else None
        return grad_hidden, returned, grad_bias, *(None for _ in range(7))


def _gradient(weight: Tensor, master: Tensor | None, needed: bool) -> tuple[Tensor, bool]:
    """Where the gradient of the output head's weight is summed up, and whether it is wanted."""
    if master is None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(weight.shape if needed else (), dtype=wide, device=weight.device), needed
    if master.requires_grad and master.grad is None:
        master.grad = torch.zeros_like(master)
    return (master if master.grad is None else master.grad), master.requires_grad


def _pick(into: Tensor, logits: Tensor, places: Tensor) -> None:
    """Put logits at `places` [N, 1] into the rows whose place is within them."""
    inside = (places >= 0) & (places < logits.shape[-1])
    into.copy_(torch.where(inside, logits.gather(-1, places.clamp(0, logits.shape[-1] - 1)), into))


def _add_at(logits: Tensor, places: Tensor, values: Tensor) -> None:
    """Add `values` [N, 1] at `places` [N, 1] of the rows whose place is within them."""
    inside = (places >= 0) & (places < logits.shape[-1])
    logits.scatter_add_(-1, places.clamp(0, logits.shape[-1] - 1), values * inside)


def _slices(length: int, size: int) -> list[slice]:
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
