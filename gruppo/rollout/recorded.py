"""Groups recorded by an earlier run, used to reproduce its steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gruppo.errors import UsageError
from gruppo.rollout.labels import LabelledCompletion, read_labels
from gruppo.rollout.live import LiveRollouts
from gruppo.rollout.recorded_rows import Row, completion_of, read_groups, reward_of
from gruppo.rollout.source import Step
from gruppo.runs.reading import old_parts, read_lines
from gruppo.types import Completion, Group, Prompt, Reward


@dataclass
class Recording:
    """The rollouts and labels of a run folder."""

    folder: Path
    _read: tuple[int, list[list[Row]]] = (-1, [])
    _first: tuple[int, int] = (-1, 0)

    def groups(self, step: int) -> list[list[Row]]:
        """The rows of a step, by group. Raises UsageError if the step has no table."""
        if self._read[0] != step:
            self._read = step, read_groups(self.table(step), old_parts(self.folder))
        return self._read[1]

    def group(self, step: int, cursor: int) -> list[Row]:
        """The rows of the group whose prompt has index `cursor` (from 0) among the prompts sampled in the run.

        The first call for a step must ask for its first group.
        """
        if self._first[0] != step:
            self._first = step, cursor
        groups, place = self.groups(step), cursor - self._first[1]
        if place >= len(groups):
            raise UsageError(f"{self.table(step)}: contains {len(groups)} groups, but the step needs more")
        return groups[place]

    def table(self, step: int) -> Path:
        """The rollout table of a step."""
        return self.folder / "rollouts" / f"step-{step:06d}.parquet"

    def labels(self, step: int) -> list[LabelledCompletion]:
        """Labels that the reward model was trained on at the start of the iteration after `step` steps."""
        return read_labels([self.folder / "labels" / f"step-{step:06d}.parquet"])

    def micro_batch_tokens(self, step: int, iteration: bool, otherwise: int) -> int:
        """Recorded micro-batch size of a step, or of the start of the iteration after it (`iteration`); `otherwise` if
        its metrics line has none."""
        for line in read_lines(self.folder / "metrics.jsonl"):
            if (line["step"], "iteration" in line) == (step, iteration) and "memory/micro_batch_tokens" in line:
                return int(line["memory/micro_batch_tokens"])
        return otherwise


@dataclass
class RecordedRollouts(LiveRollouts):
    """See `RolloutSource`. Completions and rewards come from a recording.

    `scored`: the step whose rewards are also computed again. They are stored in `rewards`, by group and completion; the
    step continues with the recorded rewards.
    """

    recording: Recording
    scored: int
    rewards: list[list[Reward]] = field(default_factory=list)

    def sample(
        self, prompts: Sequence[Prompt], streams: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """The recorded completions. A stream is (seed, step, index of the prompt in the run, number in the group)."""
        recorded, completions = [], []
        for prompt, keys in zip(prompts, streams, strict=True):
            _, step, cursor, _ = keys[0]
            rows = self.recording.group(step, cursor)
            content, ids = prompt.content, tuple(rows[0]["prompt_token_ids"])
            if self.multi_turn is not None:  # the recorded prompt ends with the environment's first observation
                content = rows[0]["prompt"] if isinstance(content, str) else json.loads(rows[0]["prompt"])
                same = rows[0]["prompt_id"] == prompt.id
            else:
                same = ids == prompt.token_ids
            if not same or len(rows) != len(keys):
                raise UsageError(
                    f"{self.recording.table(step)}: contains other prompts than the run's recipe samples in that step"
                )
            recorded.append(replace(prompt, content=content, token_ids=ids))
            completions.append([completion_of(row) for row in rows])
        return recorded, completions

    def score(
        self, step: Step, cursor: int, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[Group]:
        """Groups with the recorded rewards."""
        if step.number == self.scored:
            self.rewards += [list(group.rewards) for group in super().score(step, cursor, prompts, completions)]
        return [
            Group(prompt, group, [reward_of(row) for row in self.recording.group(step.number, cursor + place)])
            for place, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
        ]

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """The recorded labels."""
        return self.recording.labels(step), Counter()

    def _require_rewards(self, step: Step, groups: Sequence[Group]) -> None:
        """Does nothing: the failure limit was checked when the step was recorded."""
