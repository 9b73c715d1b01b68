"""Sampling of one token per row of logits, with temperature and truncation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from gruppo.engines.base import SamplingParams
from gruppo.models.ops.pairs import Pair
from gruppo.models.ops.sampling import sample

Sums = Tensor | Pair  # float64, or pairs of float32 on devices without float64
_BLOCK = 256


def sample_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"] | Float[Tensor, "B 2"], options: SamplingParams
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Sample one token per row from the truncated softmax(logits / temperature) by inverting its distribution function.

    `uniforms` has one number in [0, 1) per row: in float64, or as the high and the low part of a `Pair`, for devices
    without float64. The logits are read once: sums over blocks select the block, then sums within the block select the
    token. With pairs the result is the same, unless a number is within 2^-45 of the border between two tokens.

    Returns the tokens and their log-probabilities (nats) under the distribution they were sampled from. With
    temperature 0, returns the most likely token and its log-probability at temperature 1. A token of probability 0 is
    never sampled. The log-probability is NaN if the logits are not finite. Nothing waits for the device.
    """
    plain = options.top_k <= 0 and options.top_p >= 1 and options.min_p <= 0
    if options.temperature and plain and (sampled := sample(logits, options.temperature, uniforms)) is not None:
        return sampled
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not options.temperature:
        best = logits.max(dim=-1)
        return best.indices, best.values - logits.logsumexp(dim=-1)
    paired = uniforms.dim() == 2
    goals: Sums = Pair(*uniforms.unbind(-1)) if paired else uniforms.double()
    weights = truncated_probabilities(logits, options, paired)
    if over := weights.shape[-1] % _BLOCK:
        weights = pad(weights, (0, _BLOCK - over))
    blocks = weights.view(len(weights), -1, _BLOCK)
    block_sums = blocks.sum(dim=-1)
    block_ends = _running_sums(block_sums, paired)
    goals = goals * _map(block_ends, lambda ends: ends[:, -1])  # type: ignore[operator]
    block = _first_beyond(block_ends, goals, block_sums)
    below = _map(block_ends, lambda ends: pad(ends, (1, 0)).gather(-1, block[:, None]).squeeze(-1))
    chosen = blocks[torch.arange(len(blocks), device=logits.device), block]
    tokens = block * _BLOCK + _first_beyond(_running_sums(chosen, paired), goals - below, chosen)  # type: ignore[operator]
    return tokens, weights.gather(-1, tokens[:, None]).squeeze(-1).log()


def truncated_probabilities(
    logits: Float[Tensor, "B V"], options: SamplingParams, paired: bool = False
) -> Float[Tensor, "B V"]:
    """softmax(logits / temperature) with the tokens removed by top-k, top-p and min-p at 0; each row sums to 1.

    top-p keeps the fewest most likely tokens whose probabilities, after top-k, sum to at least top_p. The most likely
    token is always kept. `paired`: sum probabilities in pairs of float32 instead of float64.
    """
    if options.temperature != 1:
        logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        border = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        ends = _running_sums(torch.softmax(ordered, dim=-1), paired)
        before = _map(ends, lambda part: pad(part[:, :-1], (1, 0)))
        beyond = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= options.top_p)
        logits = logits.masked_fill(beyond, -torch.inf)
    if options.min_p > 0:
        border = logits.max(dim=-1, keepdim=True).values + math.log(options.min_p)
        logits = logits.masked_fill(logits < border, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _running_sums(numbers: Tensor, paired: bool) -> Sums:
    return Pair(numbers, torch.zeros_like(numbers)).running_sums() if paired else numbers.double().cumsum(dim=-1)


def _map(sums: Sums, function: Callable[[Tensor], Tensor]) -> Sums:
    return sums.map(function) if isinstance(sums, Pair) else function(sums)


def _first_beyond(ends: Sums, goals: Sums, numbers: Float[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """Index of the first of the positive `numbers` whose sum with those before it exceeds the goal of its row.

    If rounding leaves none, the index of the last positive one. `ends` are the running sums of the numbers.
    """
    positive = numbers > 0
    beyond = positive & (ends > _map(goals, lambda part: part[:, None]))  # type: ignore[operator]
    index = torch.arange(numbers.shape[-1], device=numbers.device)
    first = index.where(beyond, numbers.shape[-1]).amin(dim=-1)
    last = index.where(positive, 0).amax(dim=-1)
    return torch.where(beyond.any(dim=-1), first, last)
