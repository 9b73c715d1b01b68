"""Advantages from rewards. Sample standard deviation (n - 1), ε = 1e-6 added to it; equal rewards give exactly 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6


def advantages(
    groups: Sequence[Float[Tensor, " _"]], baseline: str = "group", scale: str = "group"
) -> list[Float[Tensor, " _"]]:
    """Â_i = (r_i - b) / (s + ε) for each group's rewards (outcome supervision, DeepSeekMath §4.1.2, and its variants).

    `baseline` b: "group", the mean of the group; "leave-one-out", the mean of the group's others (RLOO); "batch", the
    mean over all groups; "none", 0. `scale` s: the standard deviation of the "group", of the rewards of all groups
    ("batch", REINFORCE++; with the group's baseline also Lite PPO, arXiv 2508.08221), or "none", s + ε = 1.

    `groups` hold the rewards of trained completions only: one that abstained is left out by the caller, as if it had
    not been sampled. Where the rewards that b or s is taken over are all equal, a group of one among them, the result
    is exactly 0, without rounding residue; with baseline "none" an s of 0 is left out. Raises ValueError on a reward
    that is not finite, for "leave-one-out" on a group of one, and for baseline "none" with scale "group", where groups
    of equal rewards would stand unscaled beside others.
    """
    if baseline == "none" and scale == "group":
        raise ValueError('baseline = "none" with scale = "group": write scale = "batch" or "none"')
    every = torch.cat(list(groups)) if groups else torch.zeros(0)
    if not torch.isfinite(every).all():
        raise ValueError(f"rewards = {every.tolist()}: a reward must be finite; let that completion abstain")
    unit = every.abs().max().clamp(min=1.0) if len(every) else every.new_ones(())  # squares of huge ones would overflow
    return [_advantages(rewards / unit, every / unit, unit, baseline, scale) for rewards in groups]


def _advantages(rewards: Tensor, every: Tensor, unit: Tensor, baseline: str, scale: str) -> Tensor:
    compared = {"group": rewards, "leave-one-out": rewards, "batch": every}
    if baseline == "none":
        centred = rewards
    elif baseline not in compared:
        raise ValueError(f'baseline = {baseline!r}: write "group", "leave-one-out", "batch" or "none"')
    elif baseline == "leave-one-out" and len(rewards) == 1:
        raise ValueError("a group of one has no other completion to compare with; leave it out")
    elif _equal(compared[baseline]):
        return torch.zeros_like(rewards)
    else:
        centred = rewards - compared[baseline].mean()
        if baseline == "leave-one-out":
            centred = centred * (len(rewards) / (len(rewards) - 1))
    spread_over = {"group": rewards, "batch": every}.get(scale)
    if spread_over is None:
        if scale != "none":
            raise ValueError(f'scale = {scale!r}: write "group", "batch" or "none"')
        return centred * unit
    if _equal(spread_over):
        return torch.zeros_like(rewards) if scale == "group" else centred * unit
    return centred / (spread_over.std(correction=1) + EPSILON / unit)


def indicators(rewards: Float[Tensor, " G"], right: float) -> Float[Tensor, " G"]:
    """Â = 1 for a reward above `right`, else 0: the gradient coefficient of RFT and Online RFT, DeepSeekMath Eq. 10."""
    return (rewards > right).to(rewards.dtype)


class Estimates(NamedTuple):
    """Of each token of a completion: its advantage, and the return that its value should have been."""

    advantages: Float[Tensor, " T"]
    returns: Float[Tensor, " T"]


def gae(rewards: Float[Tensor, " T"], values: Float[Tensor, " T+1"], gamma: float, lam: float) -> Estimates:
    """Generalised advantage estimation (arXiv 1506.02438), as in PPO, DeepSeekMath Eq. 1 and 18.

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = Σ_{l ≥ 0} (γλ)^l δ_{t+l},   R_t = A_t + V_t

    `values`: V of the state before each token, and of the state after the last one: 0 where the completion ended by
    itself, the value model's where it was cut. λ = 1 makes A_t the discounted return minus V_t, λ = 0 only δ_t. No
    tokens give no estimates. Raises ValueError unless γ and λ lie between 0 and 1.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma = {gamma}, lam = {lam}: both must lie between 0 and 1")
    deltas = rewards + gamma * values[1:] - values[:-1]
    made, following = torch.zeros_like(deltas), deltas.new_zeros(())
    for place in reversed(range(len(deltas))):
        following = deltas[place] + gamma * lam * following
        made[place] = following
    return Estimates(made, made + values[:-1])


def process_advantages(
    groups: Sequence[Sequence[tuple[Float[Tensor, " _"], Sequence[int]]]], lengths: Sequence[Sequence[int]]
) -> list[list[Float[Tensor, " _"]]]:
    """Process supervision, DeepSeekMath §4.1.3: Â_{i,t} = Σ of the normalised rewards of steps that end at or after t.

    A group holds, for each completion, the rewards of its K steps and the tokens (counted from 0, rising) on which they
    end; `lengths` its tokens. All step rewards of a group are normalised together; where they are all equal, a single
    one among them, every Â is 0. Tokens after the last step's end have 0, and so has a completion without a step.
    Raises ValueError for ends that are not one a reward, do not rise, or lie outside the completion.
    """
    made = []
    for group, sizes in zip(groups, lengths, strict=True):
        for (rewards, ends), size in zip(group, sizes, strict=True):
            inside = not ends or (ends[0] >= 0 and ends[-1] < size)
            if len(ends) != len(rewards) or list(ends) != sorted(set(ends)) or not inside:
                raise ValueError(
                    f"step_ends = {list(ends)} for {len(rewards)} step rewards and {size} tokens: must be one a "
                    "reward, rising, and within the completion"
                )
        (normal,) = advantages([torch.cat([rewards for rewards, _ in group])])
        own = []
        parts = normal.split([len(rewards) for rewards, _ in group])
        for (_, ends), part, size in zip(group, parts, sizes, strict=True):
            at = normal.new_zeros(size).index_add(0, torch.tensor(ends, dtype=torch.long), part)
            own.append(at.flip(0).cumsum(0).flip(0))
        made.append(own)
    return made


def returns_to_go(reward: float, penalties: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """R_t = r - Σ_{s ≥ t} penalty_s: what is still to come at each token of a completion whose reward r falls on its
    last token (REINFORCE++, arXiv 2501.03262)."""
    return reward - penalties.flip(0).cumsum(0).flip(0)


def _equal(values: Tensor) -> bool:
    return len(values) < 2 or bool((values == values[0]).all())
