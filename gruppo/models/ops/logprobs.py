"""Log-probabilities of target tokens from parts of the logits, and their gradient."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.models.ops.cpu.bindings import int64, kernels_for, pointer, thread_count


def logprobs_of_part(
    logits: Float[Tensor, "N V"],
    temperature: float,
    targets: Int[Tensor, " N"],
    start: int,
    target: Float[Tensor, " N"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log Σ exp z over a part of the vocabulary, and the mean of z under its softmax; z = logits / temperature.

    The part starts at token id `start`. Both results are in the accumulation dtype, one value per row. The z of targets
    in this part is written to `target`.
    """
    kernels = kernels_for(logits.dtype, narrow=[logits], wide=[target], whole=[targets])
    if kernels is not None:
        normalizer, mean = torch.empty_like(target), torch.empty_like(target)
        kernels.logprobs_of_part(
            *map(int64, logits.shape), pointer(logits), ctypes.c_float(1 / temperature), pointer(targets), int64(start),
            *map(pointer, (normalizer, mean, target)), thread_count(),
        )  # fmt: skip
        return normalizer, mean
    scaled = logits.to(target.dtype).div_(temperature) if logits.dtype != target.dtype else logits.div(temperature)
    places = targets - start
    inside = (places >= 0) & (places < scaled.shape[-1])
    values = scaled.gather(-1, places.clamp(0, scaled.shape[-1] - 1)[:, None])[:, 0]
    target.copy_(torch.where(inside, values, target))
    within = torch.softmax(scaled, dim=-1)  # faster than exp
    normalizer = scaled.amax(dim=-1) - within.amax(dim=-1).log_()
    return normalizer, within.mul_(scaled).sum(dim=-1)


def logprobs_backward(
    logits: Float[Tensor, "N V"],
    temperature: float,
    targets: Int[Tensor, " N"],
    start: int,
    normalizer: Float[Tensor, " N"],
    scale: Float[Tensor, " N"],
) -> Float[Tensor, "N V"]:
    """The gradient scale · (onehot(target) - exp(logits / temperature - normalizer)) of the logits of this part.

    The result has the dtype of the logits and may reuse their memory. `normalizer` is the log-sum-exp over the whole
    vocabulary, `scale` the incoming gradient / temperature; both have one value per row.
    """
    kernels = kernels_for(logits.dtype, narrow=[logits], wide=[normalizer, scale], whole=[targets])
    if kernels is not None:
        kernels.logprobs_backward(
            *map(int64, logits.shape), pointer(logits), ctypes.c_float(1 / temperature), pointer(targets), int64(start),
            pointer(normalizer), pointer(scale), thread_count(),
        )  # fmt: skip
        return logits
    scaled = logits.to(scale.dtype).div_(temperature) if logits.dtype != scale.dtype else logits.div(temperature)
    grad = scaled.sub_(normalizer[:, None]).exp_().mul_(-scale[:, None])
    places = targets - start
    inside = (places >= 0) & (places < grad.shape[-1])
    grad.scatter_add_(-1, places.clamp(0, grad.shape[-1] - 1)[:, None], (scale * inside)[:, None])
    return grad.to(logits.dtype)
