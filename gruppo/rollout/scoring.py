"""Rewards of sampled completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gruppo.rewards.combine import with_part
from gruppo.rollout.environments.client import NAME
from gruppo.rollout.workers.rewards import Rewards
from gruppo.rollout.workers.scoring import Scored
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.signals import Stop


def score_groups(
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    pool: Rewards,
    state: Mapping[str, Any],
    metrics: Metrics,
    progress: Progress,
    stop: Stop,
    environment: float | None = None,
) -> list[Group]:
    """Score completions with the reward functions and return groups with their rewards.

    Values that reward functions log are added to `metrics`. `environment`: weight of the environments' rewards, None if
    they give none.
    """
    groups = list(zip(prompts, sampled, strict=True))
    score = partial(pool.score, groups, state)
    return scored_groups(prompts, sampled, score, metrics, progress, stop, environment)


def scored_groups(
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    score: Callable[[Advance], Scored],
    metrics: Metrics,
    progress: Progress,
    stop: Stop,
    environment: float | None = None,
) -> list[Group]:
    """See `score_groups`. `score`: waits for the rewards of the completions, and their metrics."""
    with progress.bar("Scoring", len(prompts), "groups") as show:

        def advance(groups: float) -> None:
            stop.check()
            show(groups)

        rewards, logged = score(advance)
    stop.check()
    for name, values in logged.items():
        metrics.mean(f"reward/log/{name}", sum(values), len(values))
    groups = []
    for prompt, completions, scored in zip(prompts, sampled, rewards, strict=True):
        combined = [_with_episode(*pair, environment) for pair in zip(scored, completions, strict=True)]
        groups.append(Group(prompt, completions, combined))
    return groups


def _with_episode(reward: Reward, completion: Completion, weight: float | None) -> Reward:
    """The reward with the environment's part added. A completion whose environment failed is excluded."""
    episode = completion.episode
    if episode is None or (weight is None and episode.failure is None):
        return reward
    return with_part(reward, NAME, weight or 0.0, episode.reward if episode.failure is None else episode.failure)
