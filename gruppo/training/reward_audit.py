"""A second grader on a sample of the rewards, and the alarm when they rise and its verdicts do not (DeepSeekMath
§5.2.3: algorithms that are robust to noisy rewards).

Nothing is trained on its verdicts. A rise is a straight line's, fitted to the last steps, whose slope is more than two
standard errors; a reward that rises so while the audit's slope is not even one standard error above 0 is an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gruppo.config.sections import Audit
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Advance
from gruppo.utils.stats import trend

RISES, STAYS = 2.0, 1.0  # standard errors


@dataclass
class RewardAudit:
    """`seen`: of the last steps, the mean reward of the completions that were audited, and the audit's own."""

    pool: RewardPool
    settings: Audit
    seed: int
    seen: list[tuple[float, float]] = field(default_factory=list)

    def judge(
        self, groups: Sequence[Group], weights: Mapping[str, float], step: int, metrics: Metrics, advance: Advance
    ) -> list[str]:
        """Judge a share of a step's groups, the same for a seed and a step, and note both means; what failed, in words.
        The reward of a completion is its total, and of what judges its steps their mean, times its weight."""
        count = min(len(groups), max(1, round(self.settings.share * len(groups))))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, step, 4))))
        chosen = [groups[place] for place in sorted(random.permutation(len(groups))[:count])]
        verdicts, _ = self.pool.score([(group.prompt, group.completions) for group in chosen], {}, advance)
        for group, own in zip(chosen, verdicts, strict=True):
            for reward, verdict in zip(group.rewards, own, strict=True):
                if reward.total is not None and verdict.total is not None:
                    of_steps = (weights[name] * _mean(steps.rewards) for name, steps in reward.steps.items())
                    metrics.mean("audit/reward", reward.total + sum(of_steps))
                    metrics.mean("audit/mean", verdict.total)
                metrics.mean("audit/excluded", verdict.total is None)
        return sorted({verdict.failure for own in verdicts for verdict in own if verdict.failure})

    def alarm(self, values: dict[str, Any]) -> str | None:
        """Note a step's metrics; what is to be said of the last steps, or None."""
        pair = values.get("audit/reward"), values.get("audit/mean")
        if pair[0] is None or pair[1] is None:
            return None
        self.seen = [*self.seen, (float(pair[0]), float(pair[1]))][-self.settings.window :]
        if len(self.seen) < self.settings.window:
            return None
        rewards, audits = ([pair[side] for pair in self.seen] for side in (0, 1))
        rise, change = trend(rewards), trend(audits)
        if rise <= RISES or change >= STAYS:
            return None
        return (
            f"over the last {len(rewards)} steps the reward of audited completions rose from {_start(rewards):.3f} to "
            f"{_start(rewards[::-1]):.3f} and the audit ({self.pool.names[0]}) went from {_start(audits):.3f} to "
            f"{_start(audits[::-1]):.3f}: the policy may be learning what the reward gets wrong; read some rollouts"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _start(values: Sequence[float]) -> float:
    """The mean of the first third."""
    return float(np.mean(values[: max(1, len(values) // 3)]))
