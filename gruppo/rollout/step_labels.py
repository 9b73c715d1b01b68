"""Rule-based labels: whether a completion is correct, and how often continuations of each of its steps are correct.

Step labels follow Math-Shepherd (arXiv 2312.08935): the engine samples N continuations from the end of a step. The soft
label is the share of them that are correct (its Eq. 4), the hard label whether any of them is (Eq. 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gruppo.config.sections import RewardModel
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.errors import RunError
from gruppo.rewards.steps import checked_ends, find_split, step_tokens
from gruppo.rollout.labels import LabelledCompletion
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.scoring import score_groups
from gruppo.rollout.workers.rewards import Rewards
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepLabeller:
    """Labels completions and their steps. A completion is correct if the first function of the pool gives it more than
    `success_threshold`."""

    engine: Engine
    pool: Rewards
    tokenizer: PreTrainedTokenizerBase
    options: SamplingParams
    settings: RewardModel
    success_threshold: float
    progress: Progress
    stop: Stop

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """Sample completions of the prompts, score them with the pool and label them; see `label`."""
        streams = [[(*key, 2, place, number) for number in range(group_size)] for place in range(len(prompts))]
        sampled = sample_groups(self.engine, prompts, streams, self.options, self.progress, self.stop)
        groups = score_groups(prompts, sampled, self.pool, {}, Metrics(), self.progress, self.stop)
        return self.label(groups, (*key, 3))

    def label(self, groups: Sequence[Group], key: tuple[int, ...]) -> tuple[list[LabelledCompletion], Counter[str]]:
        """Label every completion that the reward function scored, in order. Also returns the number of failures by
        reason.

        `key`: prefix of this call's random streams; two calls with the same key sample the same continuations.
        """
        failures = Counter(
            _failure_reason(reward) for group in groups for reward in group.rewards if self._is_correct(reward) is None
        )
        scored = [
            (index, number, group.prompt, completion, correct)
            for index, group in enumerate(groups)
            for number, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
            if (correct := self._is_correct(reward)) is not None
        ]
        if self.settings.kind == "outcome":
            return [
                LabelledCompletion(prompt, completion, correct) for _, _, prompt, completion, correct in scored
            ], failures
        split = find_split(self.settings.split)
        labels: list[LabelledCompletion] = []
        places: list[tuple[int, int]] = []
        requests: list[Request] = []
        for index, number, prompt, completion, correct in scored:
            try:
                text_ends = checked_ends(split, completion.text)
            except RunError as error:
                failures[str(error)] += 1
                continue
            label = self._split(prompt, completion, correct, text_ends)
            for step, end in enumerate(label.ends):
                room = self.options.max_tokens - (end + 1)
                if room < 1 or not completion.text[label.text_ends[step] :].strip():
                    continue  # nothing can follow: the step keeps the label of the completion
                places.append((len(labels), step))
                ids = (*prompt.token_ids, *completion.token_ids[: end + 1])
                count = self.settings.continuations
                streams = [(*key, index, number, step, sample) for sample in range(count)]
                requests.append(Request(ids, streams, [room] * count, written=end + 1))
            labels.append(label)
        return self._label_steps(labels, places, requests, failures), failures

    def _is_correct(self, reward: Reward) -> bool | None:
        """None if the function failed or did not apply."""
        value = reward.parts.get(self.pool.names[0])
        return None if value is None else value > self.success_threshold

    def _split(
        self, prompt: Prompt, completion: Completion, correct: bool, text_ends: Sequence[int]
    ) -> LabelledCompletion:
        """The completion split into steps, each with the label of the whole completion for now."""
        steps = step_tokens(completion, text_ends, self.tokenizer, prompt.token_ids)
        ends, kept = tuple(end for end, _ in steps), tuple(end for _, end in steps)
        return LabelledCompletion(prompt, completion, correct, ends, kept, (float(correct),) * len(steps))

    def _label_steps(
        self,
        labels: Sequence[LabelledCompletion],
        places: Sequence[tuple[int, int]],
        requests: Sequence[Request],
        failures: Counter[str],
    ) -> list[LabelledCompletion]:
        """Sample and score the continuations and set the shares. A step none of whose continuations could be scored is
        removed."""
        total = sum(limit for request in requests for limit in request.limits or ())
        with self.progress.bar("Continuing steps", total, "tokens") as show:

            def advance(tokens: float) -> None:
                self.stop.check()
                show(tokens)

            sampled = self.engine.generate(requests, self.options, advance)
        groups, tokens = [], Counter[int]()
        for (place, step), continuations in zip(places, sampled, strict=True):
            label = labels[place]
            tokens[place] += sum(len(continuation.token_ids) for continuation in continuations)
            prefix = label.completion.token_ids[: label.ends[step] + 1]
            groups.append((label.prompt, [self._join(prefix, continuation) for continuation in continuations]))
        with self.progress.bar("Scoring steps", len(groups), "steps") as show:
            rewards, _ = self.pool.score(groups, {}, show)
        self.stop.check()
        shares: list[list[float | None]] = [list(label.shares) for label in labels]
        for (place, step), step_rewards in zip(places, rewards, strict=True):
            known = [correct for reward in step_rewards if (correct := self._is_correct(reward)) is not None]
            shares[place][step] = sum(known) / len(known) if known else None
            failures.update(_failure_reason(reward) for reward in step_rewards if self._is_correct(reward) is None)
        results = []
        for number, (label, label_shares) in enumerate(zip(labels, shares, strict=True)):
            kept = [place for place, share in enumerate(label_shares) if share is not None]
            results.append(
                replace(
                    label,
                    ends=tuple(label.ends[place] for place in kept),
                    text_ends=tuple(label.text_ends[place] for place in kept),
                    shares=tuple(share for share in label_shares if share is not None),
                    continuation_tokens=tokens[number],
                )
            )
        return results

    def _join(self, prefix: tuple[int, ...], completion: Completion) -> Completion:
        """The prefix and a continuation of it, whose text includes the prefix's, as one completion of the prompt."""
        ids = (*prefix, *completion.token_ids)
        return replace(completion, token_ids=ids, sampling_logprobs=(0.0,) * len(ids), mask=(True,) * len(ids))


def _failure_reason(reward: Reward) -> str:
    return reward.failure or "the first of reward.functions returned no number"
