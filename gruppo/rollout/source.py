"""Where the groups of a step come from."""

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
    """A step being made. `number`: counted from 1; `cursor`: how many prompts were sampled before it in the run."""

    number: int
    cursor: int
    metrics: Metrics = field(default_factory=Metrics)
    timer: PhaseTimer = field(default_factory=PhaseTimer)


class RolloutSource(Protocol):
    """Gives the scored groups of each step: live from the policy, offline from rows, or recorded by an earlier run."""

    def collect(self, step: Step) -> list[Group]:
        """The groups of a step, with rewards; `trained` says which completions may take part in the objective."""

    def record_failures(self, step: Step, groups: Sequence[Group]) -> list[str]:
        """Record an event for each reward that failed; the names of the files that keep the calls."""

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """Labelled completions that a reward model learns from at the start of an iteration, after `step` steps; and
        what failed, in words, with how often. `key`: what the random streams of this call begin with."""
