"""How the losses of tokens become one number: the weight of each token."""

from __future__ import annotations

from collections.abc import Callable

# Weights of tokens. `lengths[p]` holds the numbers of loss tokens of the *trained* completions of prompt p, over the
# whole step and all processes; the result has a token's weight for each of them. P counts the prompts that have any,
# G_p the trained completions of prompt p, |o_i| the tokens of completion i. An empty completion counts in G_p and
# weighs 0.


def sequence_mean_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/P · 1/G_p · 1/|o_i|: DeepSeekMath Eq. 3, GSPO Eq. 5."""
    return _weights(lengths, lambda group, length: 1 / (len(group) * length))


def sequence_sum_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/P · 1/G_p: the sum over a completion's tokens, RLOO."""
    return _weights(lengths, lambda group, length: 1 / len(group))


def group_token_mean_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/P · 1/Σ_j |o_j|: the mean over all tokens of a group, DAPO Eq. 8, CISPO Eq. 4."""
    return _weights(lengths, lambda group, length: 1 / sum(group))


def constant_weights(lengths: list[list[int]], max_tokens: int) -> list[list[float]]:
    """w = 1/P · 1/G_p · 1/max_tokens: Dr. GRPO."""
    return _weights(lengths, lambda group, length: 1 / (len(group) * max_tokens))


def token_mean_weights(lengths: list[list[int]], max_tokens: int = 0) -> list[list[float]]:
    """w = 1/Σ_p Σ_i |o_i|: the mean over all tokens of the step, what TRL and verl call DAPO's; REINFORCE++."""
    total = sum(map(sum, lengths))
    return [[1 / total if length else 0.0 for length in group] for group in lengths]


def _weights(lengths: list[list[int]], weight: Callable[[list[int], int], float]) -> list[list[float]]:
    prompts = sum(bool(group) for group in lengths)
    return [[weight(group, length) / prompts if length else 0.0 for length in group] for group in lengths]
