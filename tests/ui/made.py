"""Run folders that are made by hand, without a model: tables, metrics, events, a recipe and a status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.runs.tables import EVALUATIONS, ROLLOUTS, versioned

RECIPE = """
[run]
name = "made"
steps = 10

[model]
name = "some/model"

[task]
name = "arithmetic"
"""


def make_run(
    run: Path,
    recipe: str | None = RECIPE,
    metrics: Sequence[Mapping[str, Any]] = (),
    events: Sequence[Mapping[str, Any]] = (),
    **files: Mapping[str, Any],
) -> Path:
    """A run folder. `files`: contents of JSON files by name, e.g. `summary={...}` for summary.json."""
    run.mkdir(parents=True, exist_ok=True)
    if recipe is not None:
        (run / "recipe.toml").write_text(recipe, encoding="utf-8")
    for name, lines in (("metrics", metrics), ("events", events)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return run


def rollout_row(token_ids: Sequence[int] = (5, 6, 7), **changes: Any) -> dict[str, Any]:
    """A row of a table of completions: group 0 of step 1, with numbers for every token unless they are changed."""
    count = len(token_ids)
    numbers = {name: [-0.5] * count for name in ("sampling_logprobs", "old_logprobs", "ref_logprobs")}
    return {
        **dict.fromkeys(ROLLOUTS.names),
        "step": 1, "group": 0, "completion": 0, "prompt_id": "t/0", "prompt": "1+1?", "columns": '{"answer": "2"}',
        "text": "abc", "finish_reason": "stop", "policy_version": 0, "reward": 1.0, "reward_parts": '{"right": 1.0}',
        "steps": "{}", "extra": "{}", "trained": True, "prompt_token_ids": [1, 2], "prompt_token_texts": ["<s>", "1"],
        "token_ids": list(token_ids), "token_texts": [chr(92 + one) for one in token_ids], "mask": [True] * count,
        "entropy": [0.5] * count, "advantages": [1.0] * count, **numbers, **changes,
    }  # fmt: skip


def answer_row(token_ids: Sequence[int] = (5, 6, 7), **changes: Any) -> dict[str, Any]:
    """A row of a table of evaluation answers, for the set without a name."""
    count = len(token_ids)
    return {
        **dict.fromkeys(EVALUATIONS.names),
        "eval_set": "", "prompt_id": "e/0", "sample": 0, "question": "1+1?", "columns": '{"answer": "2"}',
        "answer": "abc", "correct": True, "extracted": "2", "rule": "last number", "other_rules": '{"box": null}',
        "vote": "2", "finish_reason": "stop", "prompt_token_ids": [1], "prompt_token_texts": ["1"],
        "token_ids": list(token_ids), "token_texts": [chr(92 + one) for one in token_ids], "mask": [True] * count,
        "logprobs": [-0.5] * count, **changes,
    }  # fmt: skip


def write_rollouts(run: Path, *rows: Mapping[str, Any], step: int = 1) -> Path:
    """The table of completions of a step."""
    return _write(run / "rollouts" / f"step-{step:06d}.parquet", rows, ROLLOUTS)


def write_answers(run: Path, *rows: Mapping[str, Any], step: int = 1) -> Path:
    """The table of an evaluation."""
    return _write(run / "evaluations" / f"step-{step:06d}.parquet", rows, EVALUATIONS)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), versioned(schema)), path, write_page_checksum=True)
    return path
