"""Sampling a token from each row of logits, truncated as the options say."""

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
    """Draw a token a row from softmax(logits / temperature), truncated as the options say, by inverting its
    distribution function at `uniforms`.

    One uniform number in [0, 1) a row, and one pass over the logits: sums of blocks choose the block, then the sums
    within it the token. Returns the tokens and their log-probabilities (nats) under the distribution drawn from.
    With temperature 0 the likeliest token and its log-probability at temperature 1. A token of probability 0 is
    never drawn.
    """
    plain = options.top_k <= 0 and options.top_p >= 1 and options.min_p <= 0
    if options.temperature and plain and (drawn := sample(logits, options.temperature, uniforms)) is not None:
        return drawn
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not options.temperature:
        likeliest = logits.max(dim=-1)
        return likeliest.indices, likeliest.values - logits.logsumexp(dim=-1)
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
    """softmax(logits / temperature) with the tokens that top-k, top-p and min-p leave out at 0, summing to 1.

    top-p keeps the fewest likeliest tokens whose probabilities, among those that top-k left, sum to at least p; the
    likeliest token always stays.
    """
    if options.temperature != 1:
        logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        border = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        likelier = torch.softmax(ordered, dim=-1).double().cumsum(dim=-1).roll(1, dims=-1)
        likelier[:, 0] = 0
        beyond = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= options.top_p)
        logits = logits.masked_fill(beyond, -torch.inf)
    if options.min_p > 0:
        border = logits.max(dim=-1, keepdim=True).values + math.log(options.min_p)
        logits = logits.masked_fill(logits < border, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _first_beyond(ends: Tensor, goal: Tensor) -> Tensor:
    """Index of the first of the rising `ends` that is more than `goal`; at most the last one that rises."""
    index = (ends <= goal[:, None]).sum(dim=-1)
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(index, last)
