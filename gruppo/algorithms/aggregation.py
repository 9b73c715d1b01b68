"""Token weights: how the losses of tokens are averaged into one number.

`lengths[p]` has the number of loss tokens of each *trained* completion of prompt p, over the whole step and all
processes. The result has the weight of one token for each of these completions. In the equations, P is the number of
prompts with any trained completion, G_p the number of trained completions of prompt p, and |o_i| the number of loss
tokens of completion i. An empty completion counts in G_p and has weight 0.
"""

from __future__ import annotations

from collections.abc import Callable


def sequence_mean_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/P · 1/G_p · 1/|o_i|: the mean over the tokens of a completion, then over completions and prompts.

    DeepSeekMath Eq. 3, GSPO Eq. 5.
    """
    return _weights(lengths, lambda group, length: 1 / (len(group) * length))


def sequence_sum_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/P · 1/G_p: the sum over the tokens of a completion, then the mean over completions and prompts; RLOO."""
    return _weights(lengths, lambda group, length: 1 / len(group))


def group_token_mean_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/P · 1/Σ_j |o_j|: the mean over all tokens of a group, then over prompts; DAPO Eq. 8, CISPO Eq. 4."""
    return _weights(lengths, lambda group, length: 1 / sum(group))


def constant_weights(lengths: list[list[int]], max_tokens: int) -> list[list[float]]:
    """w = 1/P · 1/G_p · 1/max_tokens: the sum over the tokens of a completion divided by a constant; Dr. GRPO."""
    return _weights(lengths, lambda group, length: 1 / (len(group) * max_tokens))


def token_mean_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/Σ_p Σ_i |o_i|: the mean over all tokens of the step; DAPO as implemented in TRL and verl, REINFORCE++."""
    total = sum(map(sum, lengths))
    return [[1 / total if length else 0.0 for length in group] for group in lengths]


def _weights(lengths: list[list[int]], weight: Callable[[list[int], int], float]) -> list[list[float]]:
    prompts = sum(bool(group) for group in lengths)
    return [[weight(group, length) / prompts if length else 0.0 for length in group] for group in lengths]
