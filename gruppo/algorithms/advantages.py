"""Advantages from rewards, by outcome, by step, and by generalized advantage estimation (GAE).

Standard deviations are sample standard deviations (n - 1 in the denominator), with ε added (by default 1e-6). Equal
rewards give advantages of exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6


def advantages(
    groups: Sequence[Float[Tensor, " _"]],
    baseline: str = "group",
    scale: str = "group",
    epsilon: float = EPSILON,
) -> list[Float[Tensor, " _"]]:
    """Â_i = (r_i - b) / (s + ε) for the rewards r of each group (DeepSeekMath §4.1.2, outcome supervision; variants).

    `groups` has one tensor [G_p] per prompt p: the rewards of its trained completions. G_p may differ between prompts.
    The caller leaves out completions whose reward failed, as if they had not been sampled. Returns one tensor [G_p] per
    prompt.

    `baseline` selects b: "group", the mean of the group; "leave-one-out", the mean of the other completions of the
    group (RLOO); "batch", the mean over all groups; "none", 0.

    `scale` selects s: the standard deviation of the rewards of the "group" or of all groups ("batch", as in
    REINFORCE++, and with baseline "group" in Lite PPO, arXiv 2508.08221); "none" sets s + ε to 1. `epsilon`: ε.

    If the rewards that b or s is computed over are all equal, as in a group of one, the result is exactly 0, without
    rounding residue. With baseline "none", an s of 0 is ignored and the rewards stay unscaled.

    Raises ValueError for a reward that is not finite; for baseline "leave-one-out" with a group of one; for baseline
    "none" with scale "group", where groups of equal rewards would stay unscaled next to scaled ones; and for an unknown
    baseline or scale.
    """
    if baseline == "none" and scale == "group":
        raise ValueError('baseline = "none" with scale = "group": write scale = "batch" or "none"')
    every = torch.cat(list(groups)) if groups else torch.zeros(0)
    if not torch.isfinite(every).all():
        raise ValueError(f"rewards = {every.tolist()}: a reward must be finite; exclude that completion")
    unit = every.abs().max().clamp(min=1.0) if len(every) else every.new_ones(())  # squares of huge rewards overflow
    return [_advantages(rewards / unit, every / unit, unit, baseline, scale, epsilon) for rewards in groups]


def _advantages(rewards: Tensor, every: Tensor, unit: Tensor, baseline: str, scale: str, epsilon: float) -> Tensor:
    """Advantages of one group. `rewards` and `every`, the rewards of all groups, are divided by `unit`."""
    compared = {"group": rewards, "leave-one-out": rewards, "batch": every}
    if baseline == "none":
        centered = rewards
    elif baseline not in compared:
        raise ValueError(f'baseline = {baseline!r}: write "group", "leave-one-out", "batch" or "none"')
    elif baseline == "leave-one-out" and len(rewards) == 1:
        raise ValueError(
            'baseline = "leave-one-out": a group of one has no other completion to compare with; leave the group out'
        )
    elif _equal(compared[baseline]):
        return torch.zeros_like(rewards)
    else:
        centered = rewards - compared[baseline].mean()
        if baseline == "leave-one-out":
            centered = centered * (len(rewards) / (len(rewards) - 1))
    spread_over = {"group": rewards, "batch": every}.get(scale)
    if spread_over is None:
        if scale != "none":
            raise ValueError(f'scale = {scale!r}: write "group", "batch" or "none"')
        return centered * unit
    if _equal(spread_over):
        return torch.zeros_like(rewards) if scale == "group" else centered * unit
    return centered / (spread_over.std(correction=1) + epsilon / unit)


def indicators(rewards: Float[Tensor, " G"], threshold: float) -> Float[Tensor, " G"]:
    """Â = 1 for a reward above `threshold`, else 0: the gradient coefficient of RFT and Online RFT, DeepSeekMath
    Eq. 10."""
    return (rewards > threshold).to(rewards.dtype)


class Estimates(NamedTuple):
    """GAE of one completion, one value per token: advantages, and returns (the targets of the value model)."""

    advantages: Float[Tensor, " T"]
    returns: Float[Tensor, " T"]


def gae(rewards: Float[Tensor, " T"], values: Float[Tensor, " T+1"], gamma: float, lam: float) -> Estimates:
    """Generalized advantage estimation (arXiv 1506.02438) as used by PPO, DeepSeekMath Eq. 1 and 18.

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = Σ_{l ≥ 0} (γλ)^l δ_{t+l},   R_t = A_t + V_t

    `rewards` r has one value per token. `values` V has one value per state: the state before each token, then the state
    after the last token. The last value is 0 if the completion finished (EOS), and the value model's prediction if it
    was truncated.

    With λ = 1, A_t is the discounted return minus V_t; with λ = 0, it is δ_t. With T = 0 both results are empty. Raises
    ValueError unless γ and λ are between 0 and 1.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma = {gamma}, lam = {lam}: both must be between 0 and 1")
    deltas = rewards + gamma * values[1:] - values[:-1]
    estimates, following = torch.zeros_like(deltas), deltas.new_zeros(())
    for place in reversed(range(len(deltas))):
        following = deltas[place] + gamma * lam * following
        estimates[place] = following
    return Estimates(estimates, estimates + values[:-1])


def process_advantages(
    groups: Sequence[Sequence[tuple[Float[Tensor, " _"], Sequence[int]]]],
    lengths: Sequence[Sequence[int]],
    epsilon: float = EPSILON,
) -> list[list[Float[Tensor, " _"]]]:
    """Process supervision, DeepSeekMath §4.1.3: Â_{i,t} = Σ of the normalized rewards of steps that end at or after t.

    A group has one pair per completion: the rewards of its K steps, and the token indices (from 0, strictly increasing)
    at which the steps end. `lengths` has the number of tokens of each completion. Returns one advantage per token.

    All step rewards of a group are normalized together, with ε = `epsilon`. If they are all equal, or there is only
    one, every Â is 0. Tokens after the end of the last step get 0, and so do all tokens of a completion without steps.

    Raises ValueError if the ends of a completion are not one per reward, not strictly increasing, or outside of the
    completion.
    """
    result = []
    for group, sizes in zip(groups, lengths, strict=True):
        for (rewards, ends), size in zip(group, sizes, strict=True):
            inside = not ends or (ends[0] >= 0 and ends[-1] < size)
            if len(ends) != len(rewards) or list(ends) != sorted(set(ends)) or not inside:
                raise ValueError(
                    f"step_ends = {list(ends)} for {len(rewards)} step rewards and {size} tokens: must be one per "
                    "reward, strictly increasing, and within the completion"
                )
        (normalized,) = advantages([torch.cat([rewards for rewards, _ in group])], epsilon=epsilon)
        totals = []
        parts = normalized.split([len(rewards) for rewards, _ in group])
        for (_, ends), part, size in zip(group, parts, sizes, strict=True):
            at_ends = normalized.new_zeros(size).index_add(0, torch.tensor(ends, dtype=torch.long), part)
            totals.append(at_ends.flip(0).cumsum(0).flip(0))
        result.append(totals)
    return result


def returns_to_go(reward: float, penalties: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """R_t = r - Σ_{s ≥ t} penalty_s: the return from token t on, if the reward r is given on the last token
    (REINFORCE++, arXiv 2501.03262)."""
    return reward - penalties.flip(0).cumsum(0).flip(0)


def _equal(values: Tensor) -> bool:
    return len(values) < 2 or bool((values == values[0]).all())
