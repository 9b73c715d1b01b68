"""Scoring completions with a reward model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from gruppo.config.sections import RewardModel
from gruppo.errors import RunError
from gruppo.models.reward_model import NAME
from gruppo.models.value_head import ScalarModel, read_states
from gruppo.rewards.steps import checked_ends, find_split, step_tokens
from gruppo.types import Completion, Group, Prompt, Reward, Steps
from gruppo.utils.oom_retry import BatchSizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """A completion with its labels. `right`: by the rule; `labels`: from 0 to 1, each with the token at whose end the
    model is read: of an outcome the last one, else the ends of steps."""

    prompt: Prompt
    completion: Completion
    right: bool
    labels: Steps


def last_token(completion: Completion) -> tuple[int, ...]:
    """Where an outcome is read; nowhere in a completion without tokens."""
    return (len(completion.token_ids) - 1,) if completion.token_ids else ()


def grouped_samples(samples: Sequence[Sample]) -> tuple[list[Group], dict[tuple[int, int], int]]:
    """Samples as groups, each prompt once, and which sample each completion is."""
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        together[sample.prompt.token_ids].append(place)
    groups, places = [], {}
    for index, own in enumerate(together.values()):
        completions = [samples[place].completion for place in own]
        groups.append(Group(samples[own[0]].prompt, completions, [], trained=[True] * len(own)))
        places.update({(index, number): place for number, place in enumerate(own)})
    return groups, places


def probabilities(
    model: ScalarModel, samples: Sequence[Sample], budget: int, device: torch.device
) -> list[tuple[float, ...]]:
    """The model's probability at each end of each sample; labels are not looked at."""
    groups, places = grouped_samples(samples)
    made: list[tuple[float, ...]] = [()] * len(samples)
    for index, number, scores in read_states(model, groups, budget, device):
        place = places[index, number]
        at = torch.tensor([scores[end + 1] for end in samples[place].labels.ends], dtype=torch.float64)
        made[place] = tuple(torch.sigmoid(at).tolist())
    return made


def with_scores(reward: Reward, kind: str, ends: Sequence[int], made: Sequence[float], weight: float) -> Reward:
    """A completion's reward with the model's judgement: of an outcome added to the total with its weight, of steps
    beside it. A completion that abstained does so still, unless nothing failed."""
    if reward.failure or not made:
        return reward
    if kind == "process":
        steps = {**reward.steps, NAME: Steps(tuple(made), tuple(ends))}
        return replace(reward, total=reward.total or 0.0, steps=steps)
    return replace(reward, total=(reward.total or 0.0) + weight * made[0], parts={**reward.parts, NAME: made[0]})


@dataclass(frozen=True)
class RewardModelScorer:
    """Scores completions with a reward model, in micro-batches that fit into memory."""

    model: ScalarModel
    settings: RewardModel
    tokenizer: PreTrainedTokenizerBase
    sizes: BatchSizes

    def score(self, groups: Sequence[Group]) -> None:
        """Put the model's judgement into the rewards; a completion whose steps cannot be told abstains."""
        places = [(group, number) for group in groups for number in range(len(group.completions))]
        asked = []
        for group, number in places:
            completion = group.completions[number]
            try:
                ends = self._ends(completion)
            except RunError as error:
                rewards, ends = list(group.rewards), ()
                rewards[number] = replace(rewards[number], total=None, failure=str(error))
                group.rewards = rewards
            asked.append(Sample(group.prompt, completion, False, Steps((0.0,) * len(ends), ends)))
        made = self.probabilities(asked, "judging by the reward model")
        scored = [
            with_scores(group.rewards[number], self.settings.kind, sample.labels.ends, own, self.settings.weight)
            for (group, number), sample, own in zip(places, asked, made, strict=True)
        ]
        following = iter(scored)
        for group in groups:
            group.rewards = [next(following) for _ in group.completions]

    def _ends(self, completion: Completion) -> tuple[int, ...]:
        if self.settings.kind == "outcome":
            return last_token(completion)
        ends = checked_ends(find_split(self.settings.split), completion.text)
        return tuple(end for end, _ in step_tokens(completion, ends, self.tokenizer))

    def probabilities(self, samples: Sequence[Sample], during: str) -> list[tuple[float, ...]]:
        """The model's probability at each end of each sample. Raises RunError where one is not finite."""
        model = self.model

        def attempt(tokens: int) -> list[tuple[float, ...]]:
            return probabilities(model, samples, tokens, model.policy.device)

        made = self.sizes.fitting("micro_batch_tokens", during, attempt)
        odd = [sample.prompt.id for sample, own in zip(samples, made, strict=True) if not all(map(math.isfinite, own))]
        if odd:
            raise RunError(
                f"the reward model's probability of a completion of {odd[0]} is not finite: its weights have diverged; "
                "begin again with a lower reward_model.learning_rate"
            )
        return made
