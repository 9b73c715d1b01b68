"""Advantages from rewards. Sample standard deviation (n - 1), ε = 1e-6 added to it; equal rewards give exactly 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6


def group_advantages(rewards: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """Outcome supervision (DeepSeekMath §4.1.2): Â_i = (r_i - mean(r)) / (std(r) + ε) over one group.

    `rewards` are those of the group's trained completions only: one that abstained is left out by the caller, as if
    it had not been sampled. Equal rewards, a group of one and an empty group give exactly 0, without rounding
    residue. Raises ValueError on a reward that is not finite.
    """
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards = {rewards.tolist()}: a reward must be finite; let that completion abstain")
    if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    scale = rewards.abs().max().clamp(min=1.0)  # squares of huge rewards would overflow
    rewards = rewards / scale
    return (rewards - rewards.mean()) / (rewards.std(correction=1) + EPSILON / scale)


def masked_group_advantages(rewards: Sequence[float | None]) -> list[float]:
    """Advantages of a group in which None marks a completion that is not trained on; its own advantage is 0."""
    used = [index for index, reward in enumerate(rewards) if reward is not None]
    values = group_advantages(torch.tensor([rewards[index] for index in used], dtype=torch.float64)).tolist()
    advantages = [0.0] * len(rewards)
    for index, value in zip(used, values, strict=True):
        advantages[index] = value
    return advantages
