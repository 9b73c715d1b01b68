"""Log-probabilities of chosen tokens from chunks of logits, and their gradient."""

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
    """Of a part of the vocabulary that begins at `start`, with z = logits / temperature: log Σ exp z, and the mean of z
    under its softmax; both wide. The z of targets that are in this part go into `target`."""
    kernels = kernels_for(logits.dtype, narrow=[logits], wide=[target], whole=[targets])
    if kernels is not None:
        normaliser, mean = torch.empty_like(target), torch.empty_like(target)
        kernels.logprobs_of_part(
            *map(int64, logits.shape), pointer(logits), ctypes.c_float(1 / temperature), pointer(targets), int64(start),
            *map(pointer, (normaliser, mean, target)), thread_count(),
        )  # fmt: skip
        return normaliser, mean
    wide = logits.to(target.dtype).div_(temperature) if logits.dtype != target.dtype else logits.div(temperature)
    places = targets - start
    inside = (places >= 0) & (places < wide.shape[-1])
    held = wide.gather(-1, places.clamp(0, wide.shape[-1] - 1)[:, None])[:, 0]
    target.copy_(torch.where(inside, held, target))
    within = torch.softmax(wide, dim=-1)  # a quicker kernel than exp's
    normaliser = wide.amax(dim=-1) - within.amax(dim=-1).log_()
    return normaliser, within.mul_(wide).sum(dim=-1)


def logprobs_backward(
    logits: Float[Tensor, "N V"],
    temperature: float,
    targets: Int[Tensor, " N"],
    start: int,
    normaliser: Float[Tensor, " N"],
    scale: Float[Tensor, " N"],
) -> Float[Tensor, "N V"]:
    """scale · (onehot(target) - exp(logits / temperature - normaliser)) of the same part, in the dtype of the logits,
    whose memory may be taken for it."""
    kernels = kernels_for(logits.dtype, narrow=[logits], wide=[normaliser, scale], whole=[targets])
    if kernels is not None:
        kernels.logprobs_backward(
            *map(int64, logits.shape), pointer(logits), ctypes.c_float(1 / temperature), pointer(targets), int64(start),
            pointer(normaliser), pointer(scale), thread_count(),
        )  # fmt: skip
        return logits
    wide = logits.to(scale.dtype).div_(temperature) if logits.dtype != scale.dtype else logits.div(temperature)
    made = wide.sub_(normaliser[:, None]).exp_().mul_(-scale[:, None])
    places = targets - start
    inside = (places >= 0) & (places < made.shape[-1])
    made.scatter_add_(-1, places.clamp(0, made.shape[-1] - 1)[:, None], (scale * inside)[:, None])
    return made.to(logits.dtype)
