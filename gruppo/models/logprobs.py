"""Token log-probabilities and entropy without the full logits.

Log-probabilities are in nats, under the full-vocabulary distribution at the sampling temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.models.ops.linear import product
from gruppo.models.ops.logprobs import logprobs_backward, logprobs_of_part

CHUNK_SIZE, PART_SIZE = 1024, 4096  # tokens and vocabulary entries whose logits are in memory at a time, on a CPU
KEPT_BYTES = 128 * 2**20  # logits kept for the backward pass on a CPU: most of those of a micro-batch
CHUNK_BYTES = 512 * 2**20  # logits in memory at a time on an accelerator


def logit_block(vocabulary: int, itemsize: int, accelerator: bool) -> tuple[int, int, int]:
    """Tokens and vocabulary entries whose logits `token_logprobs` computes at a time, and the bytes of logits that it
    keeps for the backward pass. `itemsize`: bytes of a logit.

    On a CPU, the logits stay in its caches. On an accelerator, they are those of the whole vocabulary for as many
    tokens, in steps of 64, as `CHUNK_BYTES` hold: few large matmuls, and few passes over the weight's gradient. The
    block depends on the model alone, so that another machine, or less memory after a resume, rounds in the same way.
    An accelerator keeps none: its micro-batches are so large that few would fit.
    """
    if not accelerator:
        return CHUNK_SIZE, PART_SIZE, KEPT_BYTES
    return max(64, CHUNK_BYTES // (vocabulary * itemsize) // 64 * 64), vocabulary, 0


class OutputHead(NamedTuple):
    """The output head: z = scale · (hidden · weightᵀ + bias), then softcap · tanh(z / softcap) if there is a cap.

    `master`: the parameter of which `weight` is a copy in the compute dtype. If given, the gradient of the weight is
    added to `master.grad` as soon as it is computed, and `weight` gets none.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    master: Tensor | None = None

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Logits in the accumulation dtype, float32 (or float64)."""
        return self.part_logits(hidden, slice(None)).to(self.accumulation_dtype)

    def part_logits(self, hidden: Float[Tensor, "N H"], part: slice) -> Float[Tensor, "N V"]:
        """Logits of a part of the vocabulary, in `logit_dtype`."""
        output = product(hidden, self.weight if part == slice(None) else self.weight[part])
        if self.is_product:
            return output
        logits = output.to(self.accumulation_dtype)
        if self.bias is not None:
            logits += self.bias[part]
        if self.scale != 1:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def is_product(self) -> bool:
        """Whether the logits are hidden · weightᵀ, without a bias, scale or cap."""
        return self.bias is None and self.scale == 1 and self.softcap is None

    @property
    def logit_dtype(self) -> torch.dtype:
        """The dtype of `part_logits`: that of `weight` if they are a product of it, else the accumulation dtype."""
        return self.weight.dtype if self.is_product else self.accumulation_dtype

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """The accumulation dtype: the dtype of everything after the matmul."""
        return torch.promote_types(self.weight.dtype, torch.float32)


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: OutputHead,
    targets: Int[Tensor, " N"],
    temperature: float,
    chunk_size: int = CHUNK_SIZE,
    part_size: int = PART_SIZE,
    kept_bytes: int = KEPT_BYTES,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log π(target) and the entropy of π for N tokens, in nats, with π = softmax(logits / temperature).

    Logits are computed for `chunk_size` tokens and `part_size` vocabulary entries at a time. If `hidden` needs a
    gradient, the first `kept_bytes` of them are kept for the backward pass, which computes the others again. So what is
    kept changes no bit, and memory never holds all N × V of a large micro-batch. Matmuls run in the dtype of the head,
    everything after them in float32 (or float64). The entropy is between 0 and log V and has no gradient. Both results
    are empty for N = 0.
    """
    weight, bias, scale, softcap, master = head
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, scale, softcap, master, targets, temperature, chunk_size, part_size, kept_bytes
    )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """Gradient ∂ log π_t / ∂ logits = (onehot(t) - π) / temperature, computed part by part."""

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
        kept_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        head = OutputHead(weight, bias, scale, softcap, master)
        logprobs = torch.empty(len(targets), dtype=head.accumulation_dtype, device=hidden.device)
        entropy, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        kept: dict[tuple[int, int], Tensor] = {}
        for chunk in _slices(len(targets), chunk_size):
            rows, chunk_targets = hidden[chunk].to(weight.dtype), targets[chunk]
            target = torch.zeros(len(rows), dtype=head.accumulation_dtype, device=rows.device)
            parts = []
            for part in _slices(len(weight), part_size):
                logits = head.part_logits(rows, part)
                parts.append(logprobs_of_part(logits, temperature, chunk_targets, part.start, target))
                if ctx.needs_input_grad[0] and logits.nbytes <= kept_bytes:
                    kept[chunk.start, part.start] = logits
                    kept_bytes -= logits.nbytes
            part_normalizers, means = (torch.stack(columns, dim=-1) for columns in zip(*parts, strict=True))
            normalizer = part_normalizers.logsumexp(dim=-1)
            # Probabilities of the parts; `means` are within a part.
            shares = (part_normalizers - normalizer[:, None]).exp_()
            logprobs[chunk] = target - normalizer
            entropy[chunk] = normalizer - (shares * means).sum(dim=-1)
            normalizers[chunk] = normalizer
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.rest = scale, softcap, master, temperature, chunk_size, part_size, kept
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        scale, softcap, master, temperature, chunk_size, part_size, kept = ctx.rest
        head = OutputHead(weight, bias, scale, softcap, master)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, trained = _gradient(weight, master, ctx.needs_input_grad[1])
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for chunk in _slices(len(targets), chunk_size):
            rows, chunk_targets = hidden[chunk].to(weight.dtype), targets[chunk]
            scales = (grad[chunk] / temperature).to(head.accumulation_dtype)
            grad_rows = torch.zeros(rows.shape, dtype=head.accumulation_dtype, device=rows.device)
            for part in _slices(len(weight), part_size):
                logits = kept.pop((chunk.start, part.start), None)  # its memory is reused
                if logits is None:
                    logits = head.part_logits(rows, part)
                slope = None if softcap is None else 1 - (logits / softcap).square_()
                grad_logits = logprobs_backward(
                    logits, temperature, chunk_targets, part.start, normalizers[chunk], scales
                )
                if slope is not None:
                    grad_logits *= slope
                if scale != 1:
                    grad_logits *= scale
                if grad_bias is not None:
                    grad_bias[part] += grad_logits.sum(dim=0)
                grad_part = grad_logits.to(weight.dtype)
                grad_rows += grad_part @ weight[part]
                if trained:
                    grad_weight[part] += grad_part.T @ rows
            grad_hidden[chunk] = grad_rows.to(hidden.dtype)
        returned = grad_weight.to(weight.dtype) if trained and master is None else None
        return grad_hidden, returned, grad_bias, *(None for _ in range(8))


def _gradient(weight: Tensor, master: Tensor | None, needed: bool) -> tuple[Tensor, bool]:
    """The tensor in which the gradient of the output head's weight is accumulated, and whether it is needed."""
    if master is None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(weight.shape if needed else (), dtype=dtype, device=weight.device), needed
    if master.requires_grad and master.grad is None:
        master.grad = torch.zeros_like(master)
    return (master if master.grad is None else master.grad), master.requires_grad


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
