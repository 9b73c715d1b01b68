"""Prompts -> scored groups: sampling and rewards of a step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.data.offline import Given
from gruppo.engines.base import Engine, Request, SamplingOptions
from gruppo.rewards import with_part
from gruppo.rollout.environments.client import NAME
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Completion, Episode, Group, Metrics, Prompt, Reward
from gruppo.utils.progress import Reporter
from gruppo.utils.signals import Stop


def sample_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    streams: Sequence[Sequence[tuple[int, ...]]],
    options: SamplingOptions,
    reporter: Reporter,
    stop: Stop,
    label: str = "Sampling",
) -> list[list[Completion]]:
    """Completions of every prompt, one for each of its streams, under a progress bar of tokens at the most."""
    requests = [Request(prompt.token_ids, keys) for prompt, keys in zip(prompts, streams, strict=True)]
    total = sum(len(keys) for keys in streams) * options.max_tokens
    with reporter.progress(label, total, "tokens") as show:

        def advance(tokens: float) -> None:
            stop.check()
            show(tokens)

        return engine.generate(requests, options, advance)


def score_groups(
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    pool: RewardPool,
    state: Mapping[str, Any],
    metrics: Metrics,
    reporter: Reporter,
    stop: Stop,
    environment: float | None = None,
) -> list[Group]:
    """Groups with their rewards; what reward functions log goes into `metrics`. `environment`: the weight of what
    environments give, None where they give nothing."""
    with reporter.progress("Rewarding", len(prompts), "groups") as show:

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


def given_groups(prompts: Sequence[Prompt], given: Mapping[str, Given]) -> list[Group]:
    """Groups of the completions that rows bring, with their rewards."""
    return [
        Group(prompt, [each for each, _ in given[prompt.id]], [Reward(value, {}) for _, value in given[prompt.id]])
        for prompt in prompts
    ]


def describe_groups(groups: Sequence[Group], metrics: Metrics, by_task: bool = False) -> None:
    """Metrics of what was sampled and how it was scored; lengths in tokens. `by_task`: also the reward of each task."""
    for group in groups:
        totals = [reward.total for reward in group.rewards if reward.total is not None]
        metrics.mean("reward/mean", sum(totals), len(totals))
        if by_task:
            metrics.mean(f"reward/task/{group.prompt.task}/mean", sum(totals), len(totals))
        if len(totals) > 1:
            metrics.mean("reward/std", statistics.stdev(totals))
        for name in sorted({name for reward in group.rewards for name in reward.parts}):
            given = [part for reward in group.rewards if (part := reward.parts.get(name)) is not None]
            if len(given) > 1:
                metrics.mean(f"reward/{name}/std", statistics.stdev(given))
        metrics.mean("groups/with_signal", group.has_signal)
        metrics.mean(
            "groups/duplicate_completions",
            len(group.completions) - len({c.token_ids for c in group.completions}),
            len(group.completions),
        )
        for completion, reward, used, advantages in zip(
            group.completions, group.rewards, group.trained, group.advantages, strict=True
        ):
            metrics.mean("reward/abstained", reward.total is None)
            for name, part in reward.parts.items():
                if part is not None:
                    metrics.mean(f"reward/{name}/mean", part)
            for name, steps in reward.steps.items():
                metrics.mean(f"reward/{name}/step_mean", sum(steps.rewards), len(steps.rewards))
                metrics.mean(f"reward/{name}/steps", len(steps.rewards))
            metrics.mean("completion/length", sum(completion.mask))
            metrics.maximum("completion/length_max", sum(completion.mask))
            metrics.minimum("completion/length_min", sum(completion.mask))
            metrics.mean("completion/truncated", completion.finish_reason == "length")
            metrics.mean("completion/trained", used)
            if completion.episode is not None:
                _describe_episode(completion, completion.episode, metrics)
            if used and advantages:
                metrics.maximum("advantage/max", max(advantages))
                metrics.minimum("advantage/min", min(advantages))


def _describe_episode(completion: Completion, told: Episode, metrics: Metrics) -> None:
    metrics.mean("environment/turns", told.turns)
    metrics.mean("environment/called", told.calls > 0)
    metrics.mean("environment/calls", told.calls)
    metrics.mean("environment/errors", told.errors, told.calls)
    metrics.mean("environment/failed", told.failure is not None)
    metrics.mean("environment/tokens", completion.mask.count(False))
