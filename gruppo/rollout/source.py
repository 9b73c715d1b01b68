"""Sources of the groups of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gruppo.rollout.labels import LabelledCompletion
from gruppo.types import Group, Prompt
from gruppo.utils.metrics import Metrics
from gruppo.utils.timing import PhaseTimer


@dataclass(frozen=True)
class Step:
    """A step in progress.

    `number`: counted from 1; `cursor`: how many prompts the run sampled before this step. `beside`: seconds of phases
    that ran while earlier steps trained.
    """

    number: int
    cursor: int
    metrics: Metrics = field(default_factory=Metrics)
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    beside: dict[str, float] = field(default_factory=dict)


class RolloutSource(Protocol):
    """Provides the scored groups of each step: sampled from the current policy, read from dataset rows, or recorded by
    an earlier run."""

    def collect(self, step: Step) -> list[Group]:
        """The groups of a step, with rewards. `trained` marks the completions that may take part in the objective."""

    def record_failures(self, step: Step, groups: Sequence[Group]) -> list[str]:
        """Record an event for each failed reward. Returns the names of the files in which the calls were saved."""

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """Labeled completions for training the reward model at the start of an iteration, after `step` steps, and the
        number of failures by reason. `key`: prefix of this call's random streams."""
