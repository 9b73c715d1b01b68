"""Tables of run folders that tests of the index write, and its answers computed with pandas from the same tables."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.runs.tables import EVALUATIONS, ROLLOUTS, versioned

THRESHOLD = 0.5  # method.success_threshold of a run without a recipe
_SPECIAL = (None, float("nan"), float("inf"), -0.5, 0.0, 0.5, 1.0)  # rewards that random tables have besides others
_moments = count(10**18, 10**9)


def write(run: Path, kind: str, step: int, table: pa.Table | bytes) -> Path:
    """Write a table as a run does. Every file has a time of its own, so no test depends on the clock."""
    path = run / kind / f"step-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    if isinstance(table, bytes):
        temporary.write_bytes(table)
    else:
        pq.write_table(table, temporary)
    moment = next(_moments)
    os.utime(temporary, ns=(moment, moment))
    temporary.replace(path)
    return path


def rollouts(rows: list[dict[str, Any]], step: int = 1) -> pa.Table:
    """A table of a step. A row without "advantages" has the same one at both of its tokens; other columns are null."""
    filled = [
        {
            "step": step, "completion": 0, "prompt_id": f"task/{row['group']}", "prompt": "What is 1 + 1?",
            "text": "two", "finish_reason": "stop", "reward": 1.0, "reward_parts": "{}", "trained": True,
            "token_ids": [1, 2], "mask": [True, True], "advantages": [0.5, 0.5], **row,
        }
        for row in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(filled, versioned(ROLLOUTS))


def random_rollouts(source: np.random.Generator, step: int, groups: int = 4, prompts: int = 6) -> pa.Table:
    """Groups of 1 to 5 completions with rewards that may be missing or not finite, in random order."""
    rows = []
    for group in range(groups):
        prompt = int(source.integers(prompts))
        shared = {
            "group": group,
            "prompt_id": f"task/{prompt}",
            "prompt": json.dumps([{"role": "user", "content": f"Question {prompt}, 50% of_it"}]),
            "skipped": "all rewards are equal" if source.random() < 0.3 else None,
        }
        for completion in range(int(source.integers(1, 6))):
            length = int(source.integers(0, 7))
            special = source.random() < 0.6
            advantage = float(source.choice([0.0, 1.5]))
            rows.append({
                **shared,
                "completion": completion,
                "reward": _SPECIAL[int(source.integers(len(_SPECIAL)))] if special else float(source.normal()),
                "finish_reason": str(source.choice(["stop", "length"])),
                "trained": bool(source.random() < 0.8),
                "token_ids": list(range(length)),
                "mask": [bool(value) for value in source.random(length) < 0.8],
                "advantages": [advantage] * length,
            })  # fmt: skip
    source.shuffle(rows)  # type: ignore[arg-type]
    return rollouts(rows, step)


def evaluation(rows: list[dict[str, Any]]) -> pa.Table:
    """A table of an evaluation; columns that a row does not name are null or, if the index needs them, filled."""
    filled = [
        {"eval_set": "", "sample": 0, "question": "What is 1 + 1?", "answer": "2", "correct": True, "vote": "2",
         "finish_reason": "stop", "token_ids": [1, 2], "mask": [True, True], **row}
        for row in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(filled, versioned(EVALUATIONS))


def random_evaluation(source: np.random.Generator, questions: int = 6) -> pa.Table:
    """Up to 3 answers to some of the questions, in two sets."""
    rows = [
        {
            "eval_set": eval_set,
            "prompt_id": f"task/{question}",
            "question": f"Question {question}, 50% of_it",
            "sample": sample,
            "correct": [True, False, None][int(source.integers(3))],
            "vote": [None, "1", "2"][int(source.integers(3))],
            "score": float(source.normal()),
            "finish_reason": str(source.choice(["stop", "length"])),
            "mask": [True] * int(source.integers(5)),
        }
        for eval_set in ("", "other")
        for question in range(questions)
        if source.random() < 0.8
        for sample in range(int(source.integers(1, 4)))
    ]
    return evaluation(rows)


def raw_completions(run: Path) -> pd.DataFrame:
    """All completions of a run, with what the index derives of each. Files of a few bytes are left out."""
    paths = sorted((run / "rollouts").glob("*.parquet"))
    tables = [pq.read_table(path).to_pandas() for path in paths if path.stat().st_size > 100]
    frame = pd.concat(tables, ignore_index=True)
    frame["reward"] = frame["reward"].astype(float).where(np.isfinite(frame["reward"].astype(float)))
    frame["length"] = frame["mask"].map(sum)
    frame["right"] = frame["reward"] > THRESHOLD
    frame["truncated"] = frame["finish_reason"] == "length"
    frame["excluded"] = frame["reward"].isna()
    frame["nonzero"] = frame["trained"] & frame["advantages"].map(lambda values: any(value != 0 for value in values))
    frame["prompt"] = frame["prompt"].map(lambda text: json.loads(text)[-1]["content"])
    return frame.sort_values(["step", "group", "completion"], ignore_index=True)


def raw_groups(completions: pd.DataFrame) -> pd.DataFrame:
    """The groups of `raw_completions`, one row each, in order."""
    grouped = completions.groupby(["step", "group"], as_index=False)
    return grouped.agg(
        prompt_id=("prompt_id", "first"), prompt=("prompt", "first"), mean=("reward", "mean"), std=("reward", "std"),
        best=("reward", "max"), shortest=("length", "min"), longest=("length", "max"), completions=("length", "size"),
        truncated=("truncated", "sum"), excluded=("excluded", "sum"), trained=("trained", "sum"),
        right=("right", "sum"), nonzero=("nonzero", "any"), skipped=("skipped", "first"),
    )  # fmt: skip


def raw_answers(run: Path) -> pd.DataFrame:
    """All evaluation answers of a run, with the step and the position in the table."""
    tables = []
    for path in sorted((run / "evaluations").glob("*.parquet")):
        frame = pq.read_table(path).to_pandas()
        tables.append(frame.assign(step=int(path.stem.removeprefix("step-")), position=range(len(frame))))
    frame = pd.concat(tables, ignore_index=True)
    return frame.assign(correct=[value is True for value in frame["correct"]], length=frame["mask"].map(len))


def plain(value: Any) -> Any:
    """A value of pandas as the index returns it: None for NaN, Python's numbers."""
    if value is None or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as the index returns them."""
    return [{name: plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
