"""The texts of evaluation answers, side by side: two steps of a run, or two runs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gruppo.errors import UsageError
from gruppo.runs.reading import own_table, read_batches
from gruppo.runs.tables import EVALUATIONS, ROLLOUTS

_COLUMNS = (
    "eval_set",
    "prompt_id",
    "sample",
    "question",
    "columns",
    "answer",
    "correct",
    "extracted",
    "rule",
    "finish_reason",
)
_SCHEMA = pa.schema([EVALUATIONS.field(name) for name in _COLUMNS])
_COMPLETIONS = pa.schema([ROLLOUTS.field(name) for name in ("group", "text", "reward", "columns")])
LONGEST = 20_000  # characters of an answer
REFERENCES = ("answer", "solution", "target", "reference", "label", "ground_truth")  # columns that hold it, by habit


def first_answers(run: Path, step: int, eval_set: str, prompts: Collection[str]) -> dict[str, dict[str, Any]]:
    """The first answer to each of these questions in the evaluation after a step, by prompt id.

    Questions that were not asked are missing, all of them if the table is missing or damaged.
    """
    wanted = pa.array(list(prompts), pa.string())
    found: dict[str, dict[str, Any]] = {}
    try:
        for table in read_batches(own_table(run, "evaluations", step), _SCHEMA):
            chosen = table.filter(pc.and_(pc.equal(table["eval_set"], eval_set), pc.is_in(table["prompt_id"], wanted)))
            for row in chosen.to_pylist():
                if row["prompt_id"] not in found:
                    found[row["prompt_id"]] = {**row, "answer": (row["answer"] or "")[:LONGEST]}
            if len(found) == len(wanted):
                break
    except UsageError:
        return found
    return found


def best_completion(run: Path, step: int, group: int) -> dict[str, Any] | None:
    """The row of the completion of a group with the highest reward; None if the table is missing or damaged."""
    best: tuple[float, dict[str, Any]] | None = None
    try:
        for table in read_batches(own_table(run, "rollouts", step), _COMPLETIONS):
            for row in table.filter(pc.equal(table["group"], group)).to_pylist():
                value = row["reward"] if row["reward"] is not None and row["reward"] == row["reward"] else -math.inf
                if best is None or value > best[0]:
                    best = (value, {**row, "text": (row["text"] or "")[:LONGEST]})
    except UsageError:
        return None
    return best and best[1]


def reference(row: Mapping[str, Any] | None) -> str | None:
    """The reference answer among the columns of a question; None if none of them looks like one."""
    try:
        columns = json.loads(row["columns"]) if row else None
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(columns, dict):
        return None
    name = next((name for name in REFERENCES if name in columns), None)
    return None if name is None else str(columns[name])[:2_000]


def side_by_side(
    rows: Sequence[Mapping[str, Any]], sides: Sequence[Mapping[str, Any]], eval_set: str
) -> list[dict[str, Any]]:
    """The rows of `Index.changes` with texts. A side is {"run": folder, "step", "title", "share": the row's key of its
    share of right answers, "href": a function of the prompt id}."""
    prompts = [row["prompt_id"] for row in rows]
    texts = [first_answers(side["run"], side["step"], eval_set, prompts) for side in sides]
    found = []
    for row in rows:
        answers = [by_prompt.get(row["prompt_id"]) for by_prompt in texts]
        known = next((answer for answer in answers if answer is not None), None)
        found.append(
            {
                **row,
                "question": (known["question"] if known else row["question"]) or row["prompt_id"],
                "reference": reference(known),
                "sides": [
                    {"title": side["title"], "share": row[side["share"]], "row": answer,
                     "href": side["href"](row["prompt_id"])}
                    for side, answer in zip(sides, answers, strict=True)
                ],
            }
        )  # fmt: skip
    return found
