"""Rewards of sampled completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.rewards.combine import with_part
from gruppo.rollout.environments.client import NAME
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


def score_groups(
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    pool: RewardPool,
    state: Mapping[str, Any],
    metrics: Metrics,
    progress: Progress,
    stop: Stop,
    environment: float | None = None,
) -> list[Group]:
    """Groups with their rewards; what reward functions log goes into `metrics`. `environment`: the weight of what
    environments give, None where they give nothing."""
    with progress.bar("Rewarding", len(prompts), "groups") as show:

        def advance(groups: float) -> None:
            stop.check()
            show(groups)

        rewards, logged = pool.score(list(zip(prompts, sampled, strict=True)), state, advance)
    stop.check()
    for name, values in logged.items():
        metrics.mean(f"reward/log/{name}", sum(values), len(values))
    groups = []
    for prompt, completions, scored in zip(prompts, sampled, rewards, strict=True):
        whole = [_with_episode(*each, environment) for each in zip(scored, completions, strict=True)]
        groups.append(Group(prompt, completions, whole))
    return groups


def _with_episode(reward: Reward, completion: Completion, weight: float | None) -> Reward:
    """A reward with what the completion's environment gave; one that failed makes the completion abstain."""
    told = completion.episode
    if told is None or (weight is None and told.failure is None):
        return reward
    return with_part(reward, NAME, weight or 0.0, told.reward if told.failure is None else told.failure)
