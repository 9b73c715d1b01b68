"""Groups of completions from dataset rows: demonstrations and preferences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gruppo.algorithms.filtering import mark_trained
from gruppo.data.mixture import Mixture
from gruppo.data.offline import OfflineCompletions
from gruppo.rollout.labels import LabelledCompletion
from gruppo.rollout.source import Step
from gruppo.types import Group, Prompt, Reward


class OfflineRollouts:
    """See `RolloutSource`. Nothing is sampled and no reward function is called."""

    def __init__(
        self,
        prompts: Mixture,
        completions: Mapping[str, OfflineCompletions],
        prompts_per_step: int,
        mask_truncated: bool,
    ) -> None:
        self.prompts, self.completions = prompts, completions
        self.prompts_per_step, self.mask_truncated = prompts_per_step, mask_truncated

    def collect(self, step: Step) -> list[Group]:
        """See `RolloutSource`."""
        groups = offline_groups(self.prompts.draw(step.cursor, self.prompts_per_step), self.completions)
        mark_trained(groups, self.mask_truncated)
        return groups

    def record_failures(self, step: Step, groups: Sequence[Group]) -> list[str]:
        """See `RolloutSource`. No reward is called, so none can fail."""
        return []

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """See `RolloutSource`."""
        raise AssertionError("a method that trains on dataset completions has no reward model")


def offline_groups(prompts: Sequence[Prompt], completions: Mapping[str, OfflineCompletions]) -> list[Group]:
    """Groups of the completions and rewards from dataset rows."""
    return [
        Group(
            prompt,
            [completion for completion, _ in completions[prompt.id]],
            [Reward(value, {}) for _, value in completions[prompt.id]],
        )
        for prompt in prompts
    ]
