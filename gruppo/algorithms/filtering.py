"""Selection of the completions that a method trains on."""

from __future__ import annotations

from collections.abc import Sequence

from gruppo.algorithms.credit import total_reward
from gruppo.config.method_section import Method
from gruppo.types import Group


def mark_trained(groups: Sequence[Group], mask_truncated: bool) -> None:
    """Fill in `trained` of every group, and reset its advantages and log-probabilities.

    A completion is not trained on if its reward is None, or if it was truncated and `mask_truncated` is set.
    """
    for group in groups:
        group.trained = [
            reward.total is not None and not (mask_truncated and completion.finish_reason == "length")
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        ]
        reset(group)
        if not any(group.trained):
            group.skipped = f"no completion is trained on: {_why_none(group)}"


def reset(group: Group) -> None:
    """Reset advantages, log-probabilities and entropies: nothing is computed for the completions yet."""
    group.advantages = [[0.0] * len(completion.token_ids) for completion in group.completions]
    group.old_logprobs = [None] * len(group.completions)
    group.ref_logprobs = [None] * len(group.completions)
    group.entropy = [None] * len(group.completions)


def _why_none(group: Group) -> str:
    """Why no completion of the group is trained on."""
    reasons = {
        "their rewards failed": any(reward.failure is not None for reward in group.rewards),
        "no reward applies to them (all are None)": any(
            reward.total is None and reward.failure is None for reward in group.rewards
        ),
        "they were truncated": any(reward.total is not None for reward in group.rewards),
    }
    return ", or ".join(reason for reason, applies in reasons.items() if applies)


def rewards_differ(group: Group) -> bool:
    """True if two trained completions of the group have different rewards."""
    return len({reward.total for reward, used in zip(group.rewards, group.trained, strict=True) if used}) > 1


def drop(group: Group, why: str) -> None:
    """Remove a group from the objective, as if it had not been sampled. `why` is recorded unless a reason is set."""
    group.trained, group.skipped = [False] * len(group.trained), group.skipped or why


def select(groups: Sequence[Group], settings: Method) -> None:
    """Remove the completions that the method does not train on from the objective, after `mark_trained`.

    These are duplicates (`deduplicate`), correct completions beyond `max_per_prompt`, and with credit "pair" all
    completions without a partner. They are treated as if they had not been sampled.
    """
    for group in groups:
        used = [index for index, trained in enumerate(group.trained) if trained]
        if settings.deduplicate:
            texts = [group.completions[index].text for index in used]
            used = [index for place, index in enumerate(used) if texts[place] not in texts[:place]]
        correct = [index for index in used if total_reward(group, index) > settings.success_threshold]
        wrong = [index for index in used if index not in set(correct)]
        most = settings.max_per_prompt or len(used)
        if settings.credit == "pair":
            most = min(most, len(correct), len(wrong))
            wrong = wrong[:most]
        kept = {*correct[:most], *wrong}
        if any(group.trained) and not kept:
            group.skipped = "no pair: the group has no correct completion, or no wrong one"
        group.trained = [index in kept for index in range(len(group.trained))]
