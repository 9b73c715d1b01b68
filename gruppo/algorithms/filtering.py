"""Which completions a method learns from."""

from __future__ import annotations

from collections.abc import Sequence

from gruppo.algorithms.credit import total_reward
from gruppo.config.method_section import Method
from gruppo.types import Group


def mark_trained(groups: Sequence[Group], mask_truncated: bool) -> None:
    """Fill in `trained` of every group: a completion whose reward is unknown, or that was cut while `mask_truncated`,
    is not trained on."""
    for group in groups:
        group.trained = [
            reward.total is not None and not (mask_truncated and completion.finish_reason == "length")
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        ]
        group.advantages = [[0.0] * len(completion.token_ids) for completion in group.completions]
        group.old_logprobs = [None] * len(group.completions)
        group.ref_logprobs = [None] * len(group.completions)
        if not any(group.trained):
            group.skipped = "no completion is trained on: every reward abstained, or every completion was cut"


def rewards_differ(group: Group) -> bool:
    """True if two trained completions of the group have different rewards."""
    return len({reward.total for reward, used in zip(group.rewards, group.trained, strict=True) if used}) > 1


def drop(group: Group, why: str) -> None:
    """Take a group out of the objective, as if it had not been sampled; `why`, unless there is a reason already."""
    group.trained, group.skipped = [False] * len(group.trained), group.skipped or why


def select(groups: Sequence[Group], settings: Method) -> None:
    """Take out of the objective, after `mark_trained`, what the method does not learn from: repetitions (`distinct`),
    right completions beyond `max_per_prompt`, and with credit "pair" whatever has no partner.

    A completion that goes is treated as if it had not been sampled.
    """
    for group in groups:
        used = [number for number, trained in enumerate(group.trained) if trained]
        if settings.deduplicate:
            texts = [group.completions[number].text for number in used]
            used = [number for place, number in enumerate(used) if texts[place] not in texts[:place]]
        right = [number for number in used if total_reward(group, number) > settings.success_threshold]
        wrong = [number for number in used if number not in set(right)]
        most = settings.max_per_prompt or len(used)
        if settings.credit == "pair":
            most = min(most, len(right), len(wrong))
            wrong = wrong[:most]
        kept = {*right[:most], *wrong}
        if any(group.trained) and not kept:
            group.skipped = "no pair: it has no right completion, or no wrong one"
        group.trained = [number in kept for number in range(len(group.trained))]
