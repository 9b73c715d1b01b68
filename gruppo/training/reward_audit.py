"""A second grader on a sample of the rewards, and an alarm when rewards rise but its scores do not (DeepSeekMath
§5.2.3: algorithms that are robust to noisy rewards).

Nothing is trained on the audit's scores. A straight line is fitted to the last steps of each. The alarm is raised if
the reward's slope is more than two standard errors above 0, and the audit's slope is less than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gruppo.config.sections import Audit
from gruppo.rewards.combine import overall
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Advance
from gruppo.utils.random_numbers import generator_of
from gruppo.utils.stats import trend

RISES, STAYS = 2.0, 1.0  # standard errors


@dataclass
class RewardAudit:
    """Scores a share of the completions with a second grader.

    `seen`: for each of the last steps, the mean reward of the audited completions and the mean score of the audit.
    """

    pool: RewardPool
    settings: Audit
    seed: int
    seen: list[tuple[float, float]] = field(default_factory=list)

    def score(
        self, groups: Sequence[Group], weights: Mapping[str, float], step: int, metrics: Metrics, advance: Advance
    ) -> list[str]:
        """Score a share of a step's groups, and record both means. Returns descriptions of failures.

        The choice of groups depends only on the seed and the step. A completion's reward is its total plus, for every
        function that scores steps, the mean of the step rewards times the function's weight.
        """
        count = min(len(groups), max(1, round(self.settings.share * len(groups))))
        random = generator_of((self.seed, step, 4))
        chosen = [groups[place] for place in sorted(random.permutation(len(groups))[:count])]
        verdicts, _ = self.pool.score([(group.prompt, group.completions) for group in chosen], {}, advance)
        for group, group_verdicts in zip(chosen, verdicts, strict=True):
            for reward, verdict in zip(group.rewards, group_verdicts, strict=True):
                value = overall(reward, weights)
                if value is not None and verdict.total is not None:
                    metrics.mean("audit/reward", value)
                    metrics.mean("audit/mean", verdict.total)
                metrics.mean("audit/excluded", verdict.total is None)
        return sorted({verdict.failure for row in verdicts for verdict in row if verdict.failure})

    def alarm(self, values: dict[str, Any]) -> str | None:
        """Record a step's metrics. Returns the alarm that the last steps give rise to, or None."""
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
            f"{_start(rewards[::-1]):.3f} but the audit ({self.pool.names[0]}) went from {_start(audits):.3f} to "
            f"{_start(audits[::-1]):.3f}: the policy may be learning what the reward gets wrong; read some rollouts"
        )


def _start(values: Sequence[float]) -> float:
    """The mean of the first third."""
    return float(np.mean(values[: max(1, len(values) // 3)]))
