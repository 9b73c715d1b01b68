"""Rows of rollout tables as completions and rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from gruppo.data.messages import text_or_messages
from gruppo.data.tokenization import ENDING
from gruppo.errors import UsageError
from gruppo.runs.reading import read_table
from gruppo.runs.tables import ROLLOUTS
from gruppo.types import Completion, Episode, Prompt, Reward, Steps

Row = dict[str, Any]

# The columns that a reward call and its recorded values need.
CALLS = pa.schema(
    [
        ROLLOUTS.field(name)
        for name in (
            "group", "completion", "prompt_id", "prompt", "prompt_token_texts", "columns", "text", "finish_reason",
            "policy_version", "token_ids", "mask", "episode", "reward", "reward_parts", "steps", "failure", "extra",
        )
    ]
)  # fmt: skip


def read_groups(
    table: Path, renamed: Mapping[str, str] = MappingProxyType({}), columns: pa.Schema | None = None
) -> list[list[Row]]:
    """The rows of a rollout table, by group. `renamed`: new names of reward parts that have been renamed since;
    `columns`: the columns to read, all by default. Raises UsageError if the table is missing or cannot be read."""
    if not table.is_file():
        raise UsageError(f"{table}: there is no such file; the step has not run yet, or its rollouts were deleted")
    rows: list[Row] = read_table(table, columns).to_pylist()
    groups: list[list[Row]] = []
    for row in rows:
        for name in ("reward_parts", "steps") if renamed else ():
            row[name] = json.dumps({renamed.get(part, part): value for part, value in json.loads(row[name]).items()})
        if row["completion"] == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


def prompt_of(row: Row) -> Prompt:
    """The prompt recorded in a row of a rollout table, as reward functions get it, without token ids."""
    content, ending = row["prompt"], "".join((row.get("prompt_token_texts") or [])[-ENDING:])
    columns = json.loads(row["columns"])
    return Prompt(row["prompt_id"], text_or_messages(content, "", "prompt"), (), "", columns, ending=ending)


def completion_of(row: Row) -> Completion:
    """The completion recorded in a row of a rollout table. Log-probabilities that were not read are NaN."""
    logprobs = row.get("sampling_logprobs") or [float("nan")] * len(row["token_ids"])
    episode = row.get("episode")  # missing in tables written before environments existed
    return Completion(
        token_ids=tuple(row["token_ids"]),
        sampling_logprobs=tuple(0.0 if value is None else value for value in logprobs),
        mask=tuple(row["mask"]),
        finish_reason=row["finish_reason"],
        policy_version=row["policy_version"],
        text=row["text"],
        episode=None if episode is None else Episode(**json.loads(episode)),
    )


def reward_of(row: Row) -> Reward:
    """The reward recorded in a row of a rollout table."""
    steps = {
        name: Steps(tuple(value["rewards"]), tuple(value["ends"])) for name, value in json.loads(row["steps"]).items()
    }
    return Reward(row["reward"], json.loads(row["reward_parts"]), row["failure"], json.loads(row["extra"]), steps)
