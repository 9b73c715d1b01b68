"""A step that was sampled ahead of its training, and the file of a checkpoint that keeps such steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.algorithms.filtering import reset
from gruppo.data.mixture import Mixture
from gruppo.rollout.recorded_rows import Row, completion_of, reward_of
from gruppo.runs.reading import read_table, reading
from gruppo.runs.tables import ROLLOUTS, versioned
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics, Observations
from gruppo.utils.text import as_json

FILE = "ahead.parquet"

# `failures`: reasons of failed rewards by function. `report`: on the first row of a step, what is not in its rows.
SAMPLED = pa.schema(
    [
        *(
            ROLLOUTS.field(name)
            for name in (
                "step", "completion", "prompt", "prompt_token_ids", "text", "finish_reason", "policy_version", "reward",
                "reward_parts", "steps", "failure", "extra", "printed", "episode", "trained", "skipped", "token_ids",
                "mask", "sampling_logprobs",
            )
        ),
        pa.field("failures", pa.string()),
        pa.field("report", pa.string()),
    ]
)  # fmt: skip


@dataclass
class SampledStep:
    """Step `number` (from 1) after its sampling. `seconds`: of its phases. `kept`: see `Recorder.held`."""

    number: int
    groups: list[Group]
    observations: Observations = field(default_factory=lambda: Metrics().observations())
    seconds: dict[str, float] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)


def write_sampled(folder: Path, sampled: Sequence[SampledStep]) -> None:
    """Write the file of a checkpoint that is being built, unless there is nothing to keep."""
    if not sampled:
        return
    rows = [row for step in sampled for row in _rows(step)]
    table = pa.Table.from_pylist(rows, versioned(SAMPLED))
    pq.write_table(table, folder / FILE, compression="zstd", write_page_checksum=True)


def read_sampled(folder: Path, prompts: Mixture, cursor: int) -> list[SampledStep]:
    """The steps that a checkpoint keeps, in order. `cursor`: how many prompts the run sampled before the first of them.

    Raises UsageError if the file cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    steps: list[SampledStep] = []
    with reading(
        path, "use another checkpoint; without the folder of this one, --resume continues from the one before"
    ):
        rows = read_table(path, SAMPLED).to_pylist()
        drawn = iter(prompts.draw(cursor, sum(row["completion"] == 0 for row in rows)))
        for row in rows:
            if row["report"] is not None:
                steps.append(_reported(row["step"], json.loads(row["report"])))
            if row["completion"] == 0:
                steps[-1].groups.append(Group(_prompt_of(row, next(drawn)), [], [], skipped=row["skipped"]))
            _add(steps[-1].groups[-1], row)
    for step in steps:
        for group in step.groups:
            reset(group)
    return steps


def _rows(step: SampledStep) -> list[Row]:
    means, extremes = step.observations
    report = {
        "means": means,
        "extremes": [(name, value, choose.__name__) for name, value, choose in extremes],
        "seconds": step.seconds,
        "kept": step.kept,
    }
    rows: list[Row] = []
    for group in step.groups:
        content = group.prompt.content
        shared = {
            "step": step.number,
            "prompt": content if isinstance(content, str) else json.dumps(content),
            "prompt_token_ids": list(group.prompt.token_ids),
            "skipped": group.skipped,
        }
        for number, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True)):
            own = {"completion": number, "trained": group.trained[number], **_completion(completion), **_reward(reward)}
            rows.append({**shared, **own, "report": None if rows else as_json(report)})
    return rows


def _completion(completion: Completion) -> Row:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
        "token_ids": list(completion.token_ids),
        "mask": list(completion.mask),
        "sampling_logprobs": list(completion.sampling_logprobs),
        "episode": None if completion.episode is None else as_json(asdict(completion.episode)),
    }


def _reward(reward: Reward) -> Row:
    return {
        "reward": reward.total,
        "reward_parts": as_json(dict(reward.parts)),
        "steps": as_json({name: steps._asdict() for name, steps in reward.steps.items()}),
        "failure": reward.failure,
        "failures": as_json(dict(reward.failures)),
        "extra": as_json(dict(reward.extra)),
        "printed": as_json(dict(reward.printed)),
    }


def _reported(number: int, report: Mapping[str, Any]) -> SampledStep:
    choices = {"max": max, "min": min}
    means = [(str(name), float(value), float(count)) for name, value, count in report["means"]]
    extremes = [(str(name), float(value), choices[choice]) for name, value, choice in report["extremes"]]
    seconds = {str(name): float(value) for name, value in report["seconds"].items()}
    return SampledStep(number, [], ([*means], [*extremes]), seconds, list(report["kept"]))


def _prompt_of(row: Row, prompt: Prompt) -> Prompt:
    """The prompt as it was sampled from: with an environment, it may end with a first observation."""
    content = row["prompt"] if isinstance(prompt.content, str) else json.loads(row["prompt"])
    return replace(prompt, content=content, token_ids=tuple(row["prompt_token_ids"]))


def _add(group: Group, row: Row) -> None:
    reward = replace(reward_of(row), failures=json.loads(row["failures"]), printed=json.loads(row["printed"]))
    group.completions = [*group.completions, completion_of(row)]
    group.rewards = [*group.rewards, reward]
    group.trained.append(row["trained"])
