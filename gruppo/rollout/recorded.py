"""Groups that an earlier run recorded, for steps that are made again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq

from gruppo.errors import UsageError
from gruppo.rollout.labels import LabelledCompletion, read_labels
from gruppo.rollout.live import LiveRollouts
from gruppo.rollout.source import Step
from gruppo.runs.reading import old_parts, read_lines
from gruppo.types import Completion, Episode, Group, Prompt, Reward, Steps

Row = dict[str, Any]


@dataclass
class Recording:
    """The rollouts and labels of a run folder."""

    folder: Path
    _read: tuple[int, list[list[Row]]] = (-1, [])
    _first: tuple[int, int] = (-1, 0)

    def groups(self, step: int) -> list[list[Row]]:
        """The rows of a step, by group. Raises UsageError where there are none."""
        if self._read[0] != step:
            self._read = step, read_groups(self.table(step), old_parts(self.folder))
        return self._read[1]

    def group(self, step: int, draw: int) -> list[Row]:
        """The rows of the group whose prompt was the `draw`-th of the run."""
        if self._first[0] != step:
            self._first = step, draw
        groups, place = self.groups(step), draw - self._first[1]
        if place >= len(groups):
            raise UsageError(f"{self.table(step)}: holds {len(groups)} groups, and the step needs more")
        return groups[place]

    def table(self, step: int) -> Path:
        """The file of a step's rollouts."""
        return self.folder / "rollouts" / f"step-{step:06d}.parquet"

    def labels(self, step: int) -> list[LabelledCompletion]:
        """What a reward model learned from at the start of the iteration after `step` steps."""
        return read_labels([self.folder / "labels" / f"step-{step:06d}.parquet"])

    def micro_batch_tokens(self, step: int, iteration: bool, otherwise: int) -> int:
        """The size that a step was made with, or the start of the iteration after it, where their line says so."""
        for line in read_lines(self.folder / "metrics.jsonl"):
            if (line["step"], "iteration" in line) == (step, iteration) and "memory/micro_batch_tokens" in line:
                return int(line["memory/micro_batch_tokens"])
        return otherwise


@dataclass
class RecordedRollouts(LiveRollouts):
    """See `RolloutSource`. Completions and rewards are those of a recording.

    `scored`: the step whose rewards are computed again as well; they are then in `rewards`, by group and completion,
    and the step continues with the recorded ones.
    """

    recording: Recording
    scored: int
    rewards: list[list[Reward]] = field(default_factory=list)

    def sample(
        self, prompts: Sequence[Prompt], streams: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """The recorded completions. A stream is (seed, step, draw, number in the group)."""
        begun, completions = [], []
        for prompt, keys in zip(prompts, streams, strict=True):
            _, step, draw, _ = keys[0]
            rows = self.recording.group(step, draw)
            content, ids = prompt.content, tuple(rows[0]["prompt_token_ids"])
            if self.multi_turn is not None:  # the recorded prompt ends with what the environment said first
                content = rows[0]["prompt"] if isinstance(content, str) else json.loads(rows[0]["prompt"])
                same = rows[0]["prompt_id"] == prompt.id
            else:
                same = ids == prompt.token_ids
            if not same or len(rows) != len(keys):
                raise UsageError(
                    f"{self.recording.table(step)}: holds other questions than the run's recipe draws in that step"
                )
            begun.append(replace(prompt, content=content, token_ids=ids))
            completions.append([_completion(row) for row in rows])
        return begun, completions

    def score(
        self, step: Step, cursor: int, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[Group]:
        """Groups with the recorded rewards."""
        if step.number == self.scored:
            self.rewards += [list(group.rewards) for group in super().score(step, cursor, prompts, completions)]
        return [
            Group(prompt, own, [reward_of(row) for row in self.recording.group(step.number, cursor + place)])
            for place, (prompt, own) in enumerate(zip(prompts, completions, strict=True))
        ]

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """The recorded labels."""
        return self.recording.labels(step), Counter()

    def _require_rewards(self, step: Step, groups: Sequence[Group]) -> None:
        """Whether too many failed was decided when the step was made first."""


def read_groups(table: Path, renamed: Mapping[str, str] = MappingProxyType({})) -> list[list[Row]]:
    """The rows of a table of rollouts, by group; `renamed`: parts of the reward that have other names by now. Raises
    UsageError where the table is not there or cannot be read."""
    try:
        rows: list[Row] = pq.read_table(table).to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{table}: is not there; the step has not been made, or its rollouts were deleted") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{table}: cannot be read ({str(error).splitlines()[0]})") from None
    groups: list[list[Row]] = []
    for row in rows:
        for name in ("reward_parts", "steps") if renamed else ():
            row[name] = json.dumps({renamed.get(part, part): held for part, held in json.loads(row[name]).items()})
        if row["completion"] == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


def _completion(row: Row) -> Completion:
    logprobs = row["sampling_logprobs"] or [float("nan")] * len(row["token_ids"])
    episode = row.get("episode")  # not in tables from before there were environments
    return Completion(
        token_ids=tuple(row["token_ids"]),
        sampling_logprobs=tuple(0.0 if each is None else each for each in logprobs),
        mask=tuple(row["mask"]),
        finish_reason=row["finish_reason"],
        policy_version=row["policy_version"],
        text=row["text"],
        episode=None if episode is None else Episode(**json.loads(episode)),
    )


def reward_of(row: Row) -> Reward:
    """The reward in a row of rollouts."""
    steps = {
        name: Steps(tuple(each["rewards"]), tuple(each["ends"])) for name, each in json.loads(row["steps"]).items()
    }
    return Reward(row["reward"], json.loads(row["reward_parts"]), row["failure"], json.loads(row["extra"]), steps)
