"""Token log-probabilities without the full logits, and estimators of the KL divergence.

Log-probabilities are of the full-vocabulary distribution at the sampling temperature, in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.models.ops.linear import product
from gruppo.models.ops.logprobs import logprobs_backward, logprobs_of_part

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

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Logits in float32 (or float64)."""
        return self.part_logits(hidden, slice(None)).to(self.wide)

    def part_logits(self, hidden: Float[Tensor, "N H"], part: slice) -> Float[Tensor, "N V"]:
        """Logits of a part of the vocabulary: in float32 (or float64), or as the product in the dtype of `weight` made
        them where nothing is done to them."""
        made = product(hidden, self.weight if part == slice(None) else self.weight[part])
        if self.bias is None and self.scale == 1 and self.softcap is None:
            return made
        logits = made.to(self.wide)
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
        for chunk in _slices(len(targets), chunk_size):
            rows, wanted = hidden[chunk].to(weight.dtype), targets[chunk]
            target = torch.zeros(len(rows), dtype=head.wide, device=rows.device)
            parts = [
                logprobs_of_part(head.part_logits(rows, part), temperature, wanted, part.start, target)
                for part in _slices(len(weight), part_size)
            ]
            part_normalisers, means = (torch.stack(each, dim=-1) for each in zip(*parts, strict=True))
            normaliser = part_normalisers.logsumexp(dim=-1)
            shares = (part_normalisers - normaliser[:, None]).exp_()  # of each part, means being those within it
            logprobs[chunk] = target - normaliser
            entropy[chunk] = normaliser - (shares * means).sum(dim=-1)
            normalisers[chunk] = normaliser
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.rest = scale, softcap, master, temperature, chunk_size, part_size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        scale, softcap, master, temperature, chunk_size, part_size = ctx.rest
        head = OutputHead(weight, bias, scale, softcap, master)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, trained = _gradient(weight, master, ctx.needs_input_grad[1])
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for chunk in _slices(len(targets), chunk_size):
            rows, wanted = hidden[chunk].to(weight.dtype), targets[chunk]
            scales = (grad[chunk] / temperature).to(head.wide)
            grad_rows = torch.zeros(rows.shape, dtype=head.wide, device=rows.device)
            for part in _slices(len(weight), part_size):
                logits = head.part_logits(rows, part)
                slope = None if softcap is None else 1 - (logits / softcap).square_()
                made = logprobs_backward(logits, temperature, wanted, part.start, normalisers[chunk], scales)
                if slope is not None:
                    made *= slope
                if scale != 1:
                    made *= scale
                if grad_bias is not None:
                    grad_bias[part] += made.sum(dim=0)
                narrow = made.to(weight.dtype)
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


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
