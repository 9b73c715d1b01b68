"""Labels by rule: which completions are right, and how often a completion comes out right from the end of each step.

The second as in Math-Shepherd (arXiv 2312.08935): from the end of a step, N completions are sampled by the engine; the
soft label is the share of them that is right (its Eq. 4), the hard label whether any is (Eq. 3).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.recipe import RewardModel
from gruppo.engines.base import Engine, Request, SamplingOptions
from gruppo.errors import RunError, UsageError
from gruppo.models.reward_model import Sample, last_token
from gruppo.rewards.steps import checked_ends, find_split, step_tokens
from gruppo.rollout.sampling import sample_groups, score_groups
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.reading import read_table, reading
from gruppo.runs.tables import LABELS, as_json
from gruppo.types import Completion, Group, Metrics, Prompt, Reward, Steps
from gruppo.utils.progress import Reporter
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Labelled:
    """A completion, whether it is right, and of each of its steps the last token (counted from 0), where it ends in the
    text, and the share of the completions from there that are right."""

    prompt: Prompt
    completion: Completion
    right: bool
    ends: tuple[int, ...] = ()
    text_ends: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    def sample(self, settings: RewardModel) -> Sample:
        """As a reward model of these settings learns from it."""
        if settings.kind == "outcome":
            ends = last_token(self.completion)
            return Sample(self.prompt, self.completion, self.right, Steps((float(self.right),) * len(ends), ends))
        hard = settings.labels == "hard"
        values = tuple(float(share > 0) if hard else share for share in self.shares)
        return Sample(self.prompt, self.completion, self.right, Steps(values, self.ends))


@dataclass(frozen=True)
class Labeller:
    """What labels are made with. `right`: more than this, from the first of the pool's functions, is right."""

    engine: Engine
    pool: RewardPool
    tokenizer: PreTrainedTokenizerBase
    options: SamplingOptions
    settings: RewardModel
    right: float
    reporter: Reporter
    stop: Stop

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, key: tuple[int, ...]
    ) -> tuple[list[Labelled], Counter[str]]:
        """Completions of prompts, scored by the pool and labelled; see `label`."""
        streams = [[(*key, 2, place, draw) for draw in range(group_size)] for place in range(len(prompts))]
        sampled = sample_groups(self.engine, prompts, streams, self.options, self.reporter, self.stop)
        groups = score_groups(prompts, sampled, self.pool, {}, Metrics(), self.reporter, self.stop)
        return self.label(groups, (*key, 3))

    def label(self, groups: Sequence[Group], key: tuple[int, ...]) -> tuple[list[Labelled], Counter[str]]:
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
            return [Labelled(prompt, completion, right) for _, _, prompt, completion, right in judged], failures
        split = find_split(self.settings.split)
        made: list[Labelled] = []
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
        return None if value is None else value > self.right

    def _with_steps(self, prompt: Prompt, completion: Completion, right: bool, text_ends: Sequence[int]) -> Labelled:
        """With its steps, each labelled as the whole completion for now."""
        found = step_tokens(completion, text_ends, self.tokenizer)
        ends, kept = tuple(end for end, _ in found), tuple(end for _, end in found)
        return Labelled(prompt, completion, right, ends, kept, (float(right),) * len(found))

    def _settled(
        self,
        made: Sequence[Labelled],
        places: Sequence[tuple[int, int]],
        requests: Sequence[Request],
        failures: Counter[str],
    ) -> list[Labelled]:
        """The same with the shares of what was sampled; a step none of whose completions could be judged is gone."""
        total = sum(limit for request in requests for limit in request.limits or ())
        with self.reporter.progress("Continuing steps", total, "tokens") as show:

            def advance(tokens: float) -> None:
                self.stop.check()
                show(tokens)

            sampled = self.engine.generate(requests, self.options, advance)
        whole = []
        for (place, step), group in zip(places, sampled, strict=True):
            labelled = made[place]
            before = labelled.completion.token_ids[: labelled.ends[step] + 1]
            whole.append((labelled.prompt, [self._continued(before, each) for each in group]))
        with self.reporter.progress("Judging steps", len(whole), "steps") as show:
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


def label_rows(labels: Iterable[Labelled]) -> list[dict[str, Any]]:
    """A row a completion, in the columns of `gruppo.runs.tables.LABELS`."""
    rows = []
    for each in labels:
        text = each.completion.text
        starts = (0, *each.text_ends)
        rows.append(
            {
                "prompt_id": each.prompt.id,
                "prompt": as_json(each.prompt.content),
                "columns": as_json(dict(each.prompt.columns)),
                "prompt_token_ids": list(each.prompt.token_ids),
                "text": text,
                "token_ids": list(each.completion.token_ids),
                "finish_reason": each.completion.finish_reason,
                "right": each.right,
                "step_texts": [text[start:end] for start, end in zip(starts, each.text_ends, strict=False)],
                "step_ends": list(each.ends),
                "step_text_ends": list(each.text_ends),
                "soft": list(each.shares),
                "hard": [share > 0 for share in each.shares],
            }
        )
    return rows


def read_labels(files: Iterable[Path]) -> list[Labelled]:
    """The completions of tables that `label_rows` made, in order. Raises UsageError for another file."""
    made = []
    for file in files:
        try:
            rows = read_table(file, LABELS).to_pylist()
        except (OSError, UsageError) as error:
            why = str(error).splitlines()[0]
            raise UsageError(f"{file}: is no table of labels ({why}); give one that `gruppo label` wrote") from None
        with reading(file, "give one that `gruppo label` wrote"):
            made += [_labelled(row) for row in rows]
    return made


def _labelled(row: Mapping[str, Any]) -> Labelled:
    ids, size = tuple(row["token_ids"]), len(row["token_ids"])
    completion = Completion(ids, (0.0,) * size, (True,) * size, row["finish_reason"], 0, row["text"])
    content, columns = json.loads(row["prompt"]), json.loads(row["columns"])
    prompt = Prompt(row["prompt_id"], content, tuple(row["prompt_token_ids"]), "", columns)
    ends, text_ends, shares = (tuple(row[name]) for name in ("step_ends", "step_text_ends", "soft"))
    if not len(ends) == len(text_ends) == len(shares) or not all(0 <= end < size for end in ends):
        raise ValueError(f"the steps of {row['prompt_id']} do not fit its completion")
    return Labelled(prompt, completion, bool(row["right"]), ends, text_ends, shares)
