"""What a run wrote down, in place of what made it: a source of groups for steps that are made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gruppo.engines.base import Request, SamplingOptions
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.runs.reading import read_lines
from gruppo.training.step_labels import Labelled, read_labels
from gruppo.types import Completion, Episode, Group, Prompt, Reward, Steps
from gruppo.utils.progress import Advance

Row = dict[str, Any]


@dataclass
class Recorded:
    """The rollouts and labels of a run folder. It is an engine too, which gives the completions that were drawn for the
    same random streams.

    Every step goes on with the rewards that are stored. `judged`: the step whose rewards are made again as well, which
    are then in `judgements`, by group and completion.
    """

    folder: Path
    judged: int
    judgements: list[list[Reward]] = field(default_factory=list)
    _read: tuple[int, list[list[Row]]] = (-1, [])
    _first: tuple[int, int] = (-1, 0)

    def generate(
        self, requests: Sequence[Request], options: SamplingOptions, advance: Advance | None = None
    ) -> list[list[Completion]]:
        """See `Engine`. A stream is (seed, step, draw, index in the group), as the loop makes them."""
        made = []
        for request in requests:
            _, step, draw, _ = request.streams[0]
            rows = self._group(step, draw)
            if tuple(rows[0]["prompt_token_ids"]) != request.token_ids or len(rows) != len(request.streams):
                raise UsageError(f"{self._table(step)}: holds other questions than the run's recipe draws in that step")
            made.append([_completion(row) for row in rows])
        return made

    def played(
        self, prompts: Sequence[Prompt], streams: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """Prompts with what environments said first, and the completions; see `gruppo.rollout.multi_turn.Episodes.play`."""
        begun, made = [], []
        for prompt, keys in zip(prompts, streams, strict=True):
            _, step, draw, _ = keys[0]
            rows = self._group(step, draw)
            if rows[0]["prompt_id"] != prompt.id or len(rows) != len(keys):
                raise UsageError(f"{self._table(step)}: holds other questions than the run's recipe draws in that step")
            content = rows[0]["prompt"] if isinstance(prompt.content, str) else json.loads(rows[0]["prompt"])
            begun.append(replace(prompt, content=content, token_ids=tuple(rows[0]["prompt_token_ids"])))
            made.append([_completion(row) for row in rows])
        return begun, made

    def load_weights(self, policy: LanguageModel, version: int) -> None:
        """See `Engine`. What was drawn stays as it is."""

    def _group(self, step: int, draw: int) -> list[Row]:
        """The rows of the group that was the `draw`-th of the run."""
        if self._first[0] != step:
            self._first = step, draw
        groups, place = self.groups(step), draw - self._first[1]
        if place >= len(groups):
            raise UsageError(f"{self._table(step)}: holds {len(groups)} groups, and the step needs more")
        return groups[place]

    def groups(self, step: int) -> list[list[Row]]:
        """The rows of a step, by group. Raises UsageError where there are none."""
        if self._read[0] != step:
            self._read = step, read_groups(self._table(step))
        return self._read[1]

    def _table(self, step: int) -> Path:
        return self.folder / "rollouts" / f"step-{step:06d}.parquet"

    def rewarded(
        self,
        step: int,
        first: int,
        prompts: Sequence[Prompt],
        sampled: Sequence[Sequence[Completion]],
        score: Callable[[], list[Group]],
    ) -> list[Group]:
        """Groups with their stored rewards; those of the judged step are made by `score` as well. `first`: the draw of
        the first of the prompts."""
        if step == self.judged:
            self.judgements += [list(group.rewards) for group in score()]
        stored = [[reward_of(row) for row in self._group(step, first + place)] for place in range(len(prompts))]
        return [Group(prompt, own, rewards) for prompt, own, rewards in zip(prompts, sampled, stored, strict=True)]

    def labels(self, step: int) -> list[Labelled]:
        """What a reward model learned from at the start of an iteration."""
        return read_labels([self.folder / "labels" / f"step-{step:06d}.parquet"])

    def micro_batch_tokens(self, step: int, iteration: bool, otherwise: int) -> int:
        """The size that a step was made with, or the start of the iteration after it, where their line says so."""
        for line in read_lines(self.folder / "metrics.jsonl"):
            if (line["step"], "iteration" in line) == (step, iteration) and "memory/micro_batch_tokens" in line:
                return int(line["memory/micro_batch_tokens"])
        return otherwise


def read_groups(table: Path) -> list[list[Row]]:
    """The rows of a table of rollouts, by group. Raises UsageError where it is not there or cannot be read."""
    try:
        rows: list[Row] = pq.read_table(table).to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{table}: is not there; the step has not been made, or its rollouts were deleted") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{table}: cannot be read ({str(error).splitlines()[0]})") from None
    groups: list[list[Row]] = []
    for row in rows:
        if row["completion"] == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


def _completion(row: Row) -> Completion:
    drawn = row["sampling_logprobs"] or [float("nan")] * len(row["token_ids"])
    told = row.get("episode")  # not in tables from before there were environments
    return Completion(
        token_ids=tuple(row["token_ids"]),
        sampling_logprobs=tuple(0.0 if each is None else each for each in drawn),
        mask=tuple(row["mask"]),
        finish_reason=row["finish_reason"],
        policy_version=row["policy_version"],
        text=row["text"],
        episode=None if told is None else Episode(**json.loads(told)),
    )


def reward_of(row: Row) -> Reward:
    """The reward in a row of rollouts."""
    steps = {
        name: Steps(tuple(each["rewards"]), tuple(each["ends"])) for name, each in json.loads(row["steps"]).items()
    }
    return Reward(row["reward"], json.loads(row["reward_parts"]), row["failure"], json.loads(row["extra"]), steps)
