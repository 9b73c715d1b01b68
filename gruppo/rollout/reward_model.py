"""Scoring completions with a reward model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from gruppo.config.sections import RewardModel
from gruppo.errors import RunError
from gruppo.models.ranks import ALONE, Ranks, on_all_ranks
from gruppo.models.reward_model import NAME
from gruppo.models.value_head import ScalarModel, read_states
from gruppo.rewards.steps import checked_ends, find_split, step_tokens
from gruppo.types import Completion, Group, Prompt, Reward, Steps
from gruppo.utils.oom_retry import BatchSizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """A completion with its labels.

    `right`: correct according to the reward function. `labels`: values from 0 to 1, each with the token after which the
    model is read: the last token for an outcome label, the last token of a step for a step label.
    """

    prompt: Prompt
    completion: Completion
    right: bool
    labels: Steps


def last_token(completion: Completion) -> tuple[int, ...]:
    """Index of the token after which an outcome is read; empty for a completion without tokens."""
    return (len(completion.token_ids) - 1,) if completion.token_ids else ()


def grouped_samples(samples: Sequence[Sample]) -> tuple[list[Group], dict[tuple[int, int], int]]:
    """Group samples by prompt. The mapping gives the index of the sample for each (group, completion)."""
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        by_prompt[sample.prompt.token_ids].append(place)
    groups, places = [], {}
    for index, members in enumerate(by_prompt.values()):
        completions = [samples[place].completion for place in members]
        groups.append(Group(samples[members[0]].prompt, completions, [], trained=[True] * len(members)))
        places.update({(index, number): place for number, place in enumerate(members)})
    return groups, places


def probabilities(
    model: ScalarModel, samples: Sequence[Sample], budget: int, device: torch.device, ranks: Ranks = ALONE
) -> list[tuple[float, ...]]:
    """The model's probability at each label position of each sample. Label values are ignored."""
    groups, places = grouped_samples(samples)
    results: list[tuple[float, ...]] = [()] * len(samples)
    states = ranks.gather([*read_states(model, groups, budget, device, ranks.share)])
    for index, number, scores in chain.from_iterable(states):
        place = places[index, number]
        at = torch.tensor([scores[end + 1] for end in samples[place].labels.ends], dtype=torch.float64)
        results[place] = tuple(torch.sigmoid(at).tolist())
    return results


def with_scores(reward: Reward, kind: str, ends: Sequence[int], scores: Sequence[float], weight: float) -> Reward:
    """A completion's reward with the reward model's scores added.

    An outcome score is added to the total with its weight; step scores are stored next to the total. A completion whose
    reward failed stays excluded; one that no function scored takes part with the model's score.
    """
    if reward.failure or not scores:
        return reward
    if kind == "process":
        steps = {**reward.steps, NAME: Steps(tuple(scores), tuple(ends))}
        return replace(reward, total=reward.total or 0.0, steps=steps)
    return replace(reward, total=(reward.total or 0.0) + weight * scores[0], parts={**reward.parts, NAME: scores[0]})


@dataclass(frozen=True)
class RewardModelScorer:
    """Scores completions with a reward model, in micro-batches that fit into memory."""

    model: ScalarModel
    settings: RewardModel
    tokenizer: PreTrainedTokenizerBase
    sizes: BatchSizes
    ranks: Ranks = ALONE

    def score(self, groups: Sequence[Group]) -> None:
        """Add the model's scores to the rewards. A completion that cannot be split into steps is excluded."""
        places = [(group, number) for group in groups for number in range(len(group.completions))]
        samples = []
        for group, number in places:
            completion = group.completions[number]
            try:
                ends = self._ends(group.prompt, completion)
            except RunError as error:
                rewards, ends = list(group.rewards), ()
                rewards[number] = replace(rewards[number], total=None, failure=str(error))
                group.rewards = rewards
            samples.append(Sample(group.prompt, completion, False, Steps((0.0,) * len(ends), ends)))
        probabilities = self.probabilities(samples, "scoring with the reward model")
        scored = [
            with_scores(group.rewards[number], self.settings.kind, sample.labels.ends, scores, self.settings.weight)
            for (group, number), sample, scores in zip(places, samples, probabilities, strict=True)
        ]
        remaining = iter(scored)
        for group in groups:
            group.rewards = [next(remaining) for _ in group.completions]

    def _ends(self, prompt: Prompt, completion: Completion) -> tuple[int, ...]:
        if self.settings.kind == "outcome":
            return last_token(completion)
        ends = checked_ends(find_split(self.settings.split), completion.text)
        return tuple(end for end, _ in step_tokens(completion, ends, self.tokenizer, prompt.token_ids))

    def probabilities(self, samples: Sequence[Sample], during: str) -> list[tuple[float, ...]]:
        """The model's probability at each label position of each sample. Raises RunError if one is not finite."""
        results = self._probabilities(samples, during)
        for sample, values in zip(samples, results, strict=True):
            if not all(map(math.isfinite, values)):
                raise RunError(
                    f"the reward model's probability for a completion of {sample.prompt.id} is not finite: its weights "
                    "have diverged; start again with a lower reward_model.learning_rate"
                )
        return results

    @on_all_ranks
    def _probabilities(self, samples: Sequence[Sample], during: str) -> list[tuple[float, ...]]:
        model = self.model

        def attempt(tokens: int) -> list[tuple[float, ...]]:
            return probabilities(model, samples, tokens, model.policy.device, self.ranks)

        return self.sizes.run_with_retry("micro_batch_tokens", during, attempt)
