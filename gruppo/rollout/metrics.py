"""Metrics of sampled and scored groups."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from gruppo.types import Completion, Episode, Group
from gruppo.utils.metrics import Metrics


def describe_groups(
    groups: Sequence[Group], metrics: Metrics, by_task: bool = False, without_text: Collection[int] = ()
) -> None:
    """Add sampling and reward metrics of the groups; lengths are in tokens.

    `by_task`: also add the mean reward of each task. `without_text`: token ids for which the tokenizer has no text.
    """
    for group in groups:
        totals = [reward.total for reward in group.rewards if reward.total is not None]
        metrics.mean("reward/mean", sum(totals), len(totals))
        if by_task:
            metrics.mean(f"reward/task/{group.prompt.task}/mean", sum(totals), len(totals))
        if len(totals) > 1:
            metrics.mean("reward/std", statistics.stdev(totals))
        for name in sorted({name for reward in group.rewards for name in reward.parts}):
            values = [part for reward in group.rewards if (part := reward.parts.get(name)) is not None]
            if len(values) > 1:
                metrics.mean(f"reward/{name}/std", statistics.stdev(values))
        metrics.mean("groups/nonzero_advantage", group.has_nonzero_advantage)
        metrics.mean(
            "groups/duplicate_completions",
            len(group.completions) - len({c.token_ids for c in group.completions}),
            len(group.completions),
        )
        for completion, reward, used, advantages in zip(
            group.completions, group.rewards, group.trained, group.advantages, strict=True
        ):
            metrics.mean("reward/excluded", reward.total is None)
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
            if without_text:
                count = sum(token in without_text for token in completion.token_ids)
                metrics.mean("completion/without_text", count, len(completion.token_ids))
            if completion.episode is not None:
                _describe_episode(completion, completion.episode, metrics)
            if used and advantages:
                metrics.maximum("advantage/max", max(advantages))
                metrics.minimum("advantage/min", min(advantages))


def describe_staleness(groups: Sequence[Group], step: int, metrics: Metrics) -> None:
    """Add how many steps' updates (counts) came between the weights that sampled and those that are trained now."""
    for group in groups:
        for completion in group.completions:
            metrics.mean("staleness/mean", completion.staleness(step))
            metrics.maximum("staleness/max", completion.staleness(step))


def _describe_episode(completion: Completion, episode: Episode, metrics: Metrics) -> None:
    metrics.mean("environment/turns", episode.turns)
    metrics.mean("environment/called", episode.calls > 0)
    metrics.mean("environment/calls", episode.calls)
    metrics.mean("environment/errors", episode.errors, episode.calls)
    metrics.mean("environment/failed", episode.failure is not None)
    metrics.mean("environment/tokens", completion.mask.count(False))
