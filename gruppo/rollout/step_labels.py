"""Labels by rule: which completions are right, and how often a completion comes out right from the end of each step.

The second as in Math-Shepherd (arXiv 2312.08935): from the end of a step, N completions are sampled by the engine; the
soft label is the share of them that is right (its Eq. 4), the hard label whether any is (Eq. 3).
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
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepLabeller:
    """What labels are made with. A completion is right where the first of the pool's functions
    gives it more than `success_threshold`."""

    engine: Engine
    pool: RewardPool
    tokenizer: PreTrainedTokenizerBase
    options: SamplingParams
    settings: RewardModel
    success_threshold: float
    progress: Progress
    stop: Stop

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """Completions of prompts, scored by the pool and labelled; see `label`."""
        streams = [[(*key, 2, place, draw) for draw in range(group_size)] for place in range(len(prompts))]
        sampled = sample_groups(self.engine, prompts, streams, self.options, self.progress, self.stop)
        groups = score_groups(prompts, sampled, self.pool, {}, Metrics(), self.progress, self.stop)
        return self.label(groups, (*key, 3))

    def label(self, groups: Sequence[Group], key: tuple[int, ...]) -> tuple[list[LabelledCompletion], Counter[str]]:
        """Every completion that the rule could judge, in order; and what failed, in words, with how often. `key`: what
        the random streams of this call begin with; two calls with one key draw the same."""
        failures = Counter(
            _why(reward) for group in groups for reward in group.rewards if self._verdict(reward) is None
        )
        judged = [
            (index, number, group.prompt, completion, verdict)
            for index, group in enumerate(groups)
            for number, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
            if (verdict := self._verdict(reward)) is not None
        ]
        if self.settings.kind == "outcome":
            return [
                LabelledCompletion(prompt, completion, right) for _, _, prompt, completion, right in judged
            ], failures
        split = find_split(self.settings.split)
        made: list[LabelledCompletion] = []
        places: list[tuple[int, int]] = []
        requests: list[Request] = []
        for index, number, prompt, completion, right in judged:
            try:
                text_ends = checked_ends(split, completion.text)
            except RunError as error:
                failures[str(error)] += 1
                continue
            labelled = self._with_steps(prompt, completion, right, text_ends)
            for step, end in enumerate(labelled.ends):
                room = self.options.max_tokens - (end + 1)
                if room < 1 or not completion.text[labelled.text_ends[step] :].strip():
                    continue  # nothing follows: the label is the completion's own
                places.append((len(made), step))
                ids = (*prompt.token_ids, *completion.token_ids[: end + 1])
                count = self.settings.continuations
                streams = [(*key, index, number, step, draw) for draw in range(count)]
                requests.append(Request(ids, streams, [room] * count))
            made.append(labelled)
        return self._settled(made, places, requests, failures), failures

    def _verdict(self, reward: Reward) -> bool | None:
        value = reward.parts.get(self.pool.names[0])
        return None if value is None else value > self.success_threshold

    def _with_steps(
        self, prompt: Prompt, completion: Completion, right: bool, text_ends: Sequence[int]
    ) -> LabelledCompletion:
        """With its steps, each labelled as the whole completion for now."""
        found = step_tokens(completion, text_ends, self.tokenizer)
        ends, kept = tuple(end for end, _ in found), tuple(end for _, end in found)
        return LabelledCompletion(prompt, completion, right, ends, kept, (float(right),) * len(found))

    def _settled(
        self,
        made: Sequence[LabelledCompletion],
        places: Sequence[tuple[int, int]],
        requests: Sequence[Request],
        failures: Counter[str],
    ) -> list[LabelledCompletion]:
        """The same with the shares of what was sampled; a step none of whose completions could be judged is gone."""
        total = sum(limit for request in requests for limit in request.limits or ())
        with self.progress.bar("Continuing steps", total, "tokens") as show:

            def advance(tokens: float) -> None:
                self.stop.check()
                show(tokens)

            sampled = self.engine.generate(requests, self.options, advance)
        whole = []
        for (place, step), group in zip(places, sampled, strict=True):
            labelled = made[place]
            before = labelled.completion.token_ids[: labelled.ends[step] + 1]
            whole.append((labelled.prompt, [self._continued(before, each) for each in group]))
        with self.progress.bar("Judging steps", len(whole), "steps") as show:
            rewards, _ = self.pool.score(whole, {}, show)
        self.stop.check()
        shares: list[list[float | None]] = [list(each.shares) for each in made]
        for (place, step), own in zip(places, rewards, strict=True):
            known = [verdict for each in own if (verdict := self._verdict(each)) is not None]
            shares[place][step] = sum(known) / len(known) if known else None
            failures.update(_why(each) for each in own if self._verdict(each) is None)
        settled = []
        for labelled, found in zip(made, shares, strict=True):
            kept = [place for place, share in enumerate(found) if share is not None]
            settled.append(
                replace(
                    labelled,
                    ends=tuple(labelled.ends[place] for place in kept),
                    text_ends=tuple(labelled.text_ends[place] for place in kept),
                    shares=tuple(share for share in found if share is not None),
                )
            )
        return settled

    def _continued(self, before: tuple[int, ...], completion: Completion) -> Completion:
        """A continuation as a completion of the question."""
        ids = (*before, *completion.token_ids)
        spoken = ids[:-1] if completion.finish_reason == "stop" else ids
        return replace(
            completion,
            token_ids=ids,
            sampling_logprobs=(0.0,) * len(ids),
            mask=(True,) * len(ids),
            text=str(self.tokenizer.decode(list(spoken), skip_special_tokens=True)),
        )


def _why(reward: Reward) -> str:
    return reward.failure or "the first of reward.functions gave no number"
