"""Sampling of one token per row of logits, with temperature and truncation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.engines.base import SamplingParams
from gruppo.models.ops.sampling import sample


def sample_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], options: SamplingParams
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Sample one token per row from the truncated softmax(logits / temperature) by inverting its distribution function.

    `uniforms` has one number in [0, 1) per row. The logits are read once: sums over blocks select the block, then sums
    within the block select the token.

    Returns the tokens and their log-probabilities (nats) under the distribution they were sampled from. With
    temperature 0, returns the most likely token and its log-probability at temperature 1. A token of probability 0 is
    never sampled.
    """
    plain = options.top_k <= 0 and options.top_p >= 1 and options.min_p <= 0
    if options.temperature and plain and (sampled := sample(logits, options.temperature, uniforms)) is not None:
        return sampled
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not options.temperature:
        best = logits.max(dim=-1)
        return best.indices, best.values - logits.logsumexp(dim=-1)
    weights = truncated_probabilities(logits, options)
    rows, size = len(weights), 256
    if over := weights.shape[-1] % size:
        weights = torch.nn.functional.pad(weights, (0, size - over))
    blocks = weights.view(rows, -1, size)
    block_ends = blocks.sum(dim=-1).double().cumsum(dim=-1)
    goal = uniforms.double() * block_ends[:, -1]
    block = _first_beyond(block_ends, goal)
    below = torch.nn.functional.pad(block_ends, (1, 0)).gather(-1, block[:, None]).squeeze(-1)
    chosen = blocks[torch.arange(rows, device=logits.device), block]
    tokens = block * size + _first_beyond(chosen.double().cumsum(dim=-1), goal - below)
    return tokens, weights.gather(-1, tokens[:, None]).squeeze(-1).log()


def truncated_probabilities(logits: Float[Tensor, "B V"], options: SamplingParams) -> Float[Tensor, "B V"]:
    """softmax(logits / temperature) with the tokens removed by top-k, top-p and min-p at 0; each row sums to 1.

    top-p keeps the fewest most likely tokens whose probabilities, after top-k, sum to at least top_p. The most likely
    token is always kept.
    """
    if options.temperature != 1:
        logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        border = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = torch.softmax(ordered, dim=-1).double().cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        beyond = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= options.top_p)
        logits = logits.masked_fill(beyond, -torch.inf)
    if options.min_p > 0:
        border = logits.max(dim=-1, keepdim=True).values + math.log(options.min_p)
        logits = logits.masked_fill(logits < border, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _first_beyond(ends: Tensor, goal: Tensor) -> Tensor:
    """Index of the first of the increasing `ends` that exceeds `goal`; at most the index of the last increase."""
    index = (ends <= goal[:, None]).sum(dim=-1)
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(index, last)
