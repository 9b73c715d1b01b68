"""The rows that the index keeps of each table of a run: one per completion, group, step and evaluation answer.

A completion is *right* if its reward is greater than the recipe's method.success_threshold (0.5 by default), as
everywhere in gruppo; an evaluation answer is right if its grader said so. Rewards that are not finite are null. Texts
are cut: the index is for finding and sorting, and the table itself is read for what they say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gruppo.errors import UsageError
from gruppo.runs.reading import read_batches
from gruppo.runs.tables import EVALUATIONS, ROLLOUTS
from gruppo.utils.text import text_of_content

PROMPT = 300  # characters of a prompt or a question that are kept
TEXT = 1_000  # of any other text
MOST_GROUPS = 2**20  # per step; also completions per group
_LONGEST_PROMPT = 2**20  # characters; a longer prompt is not parsed as messages

_COMPLETIONS = (
    "group", "completion", "prompt_id", "prompt", "finish_reason", "reward", "reward_parts", "failure", "trained",
    "skipped", "mask", "advantages",
)  # fmt: skip
_ANSWERS = (
    "eval_set", "prompt_id", "sample", "question", "correct", "extracted", "rule", "vote", "score", "finish_reason",
    "mask",
)  # fmt: skip
Tables = Mapping[str, pa.Table]


def shortened(prompt: str) -> str:
    """The first `PROMPT` characters of a prompt: of its text, or of its last message if it is a list of messages."""
    if prompt.startswith("[{") and len(prompt) <= _LONGEST_PROMPT:
        with suppress(ValueError, RecursionError, AttributeError):  # a text that begins like messages
            prompt = text_of_content(json.loads(prompt)[-1].get("content"))
    return prompt[:PROMPT].encode("utf-8", "replace").decode()


def rollout_rows(path: Path, step: int, threshold: float) -> Tables:
    """The rows of the index's tables "completions", "groups" and "steps" for one table of a step.

    Raises UsageError or ArrowInvalid if the table is damaged, or has a row without group, completion or prompt id.
    """
    schema = pa.schema([ROLLOUTS.field(name) for name in _COMPLETIONS])
    rows = _joined([_completions(path, batch) for batch in read_batches(path, schema)])
    order = np.lexsort((_integers(rows["completion"]), _integers(rows["group"])))
    if (np.diff(order) != 1).any():
        rows = rows.take(pa.array(order))
    reward = _floats(rows["reward"])
    right = pa.array(reward > threshold, mask=np.isnan(reward))
    steps = pa.array(np.full(len(rows), step))
    completions = rows.drop_columns(["prompt_id", "prompt", "nonzero"])
    completions = completions.append_column("right", right).add_column(0, "step", steps)
    if not len(rows):
        return {"completions": completions}
    groups = _groups(rows, step, threshold)
    return {"completions": completions, "groups": groups, "steps": _step(step, rows, groups, reward, threshold)}


def evaluation_rows(path: Path, step: int) -> Tables:
    """The rows of the index's table "answers" for the evaluation after a step.

    Raises UsageError or ArrowInvalid if the table is damaged, or has a row without set or prompt id.
    """
    schema = pa.schema([EVALUATIONS.field(name) for name in _ANSWERS])
    batches = []
    for batch in read_batches(path, schema):
        _validate(path, batch, ("eval_set", "prompt_id"))
        score = _floats(batch["score"])
        batches.append(
            pa.table(
                {
                    "step": pa.array(np.full(len(batch), step)),
                    "eval_set": _cut(batch["eval_set"]),
                    "prompt_id": _cut(batch["prompt_id"]),
                    "sample": batch["sample"],
                    "correct": batch["correct"],
                    "extracted": _cut(batch["extracted"]),
                    "rule": _cut(batch["rule"]),
                    "vote": _cut(batch["vote"]),
                    "score": _finite(score),
                    "finish_reason": _cut(batch["finish_reason"]),
                    "length": pa.array(_sums(batch["mask"])),
                    "question": _cut(batch["question"], PROMPT),
                }
            )
        )
    rows = _joined(batches)
    return {"answers": rows.add_column(1, "position", pa.array(np.arange(len(rows))))}


def _joined(batches: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(batches).combine_chunks()


def _validate(path: Path, batch: pa.Table, needed: tuple[str, ...]) -> None:
    batch.validate(full=True)
    for name in needed:
        if batch[name].null_count:
            raise UsageError(f"{path}: has rows without {name}; restore it from a copy")


def _completions(path: Path, batch: pa.Table) -> pa.Table:
    """The rows of completions, and what groups are made of."""
    _validate(path, batch, ("group", "completion", "prompt_id"))
    group, completion = _integers(batch["group"]), _integers(batch["completion"])
    if len(batch) and not (0 <= min(group.min(), completion.min()) <= max(group.max(), completion.max()) < MOST_GROUPS):
        raise UsageError(f"{path}: group or completion is not between 0 and {MOST_GROUPS - 1}; restore it from a copy")
    reward, trained = _floats(batch["reward"]), batch["trained"].fill_null(False)
    mean, nonzero = _advantages(batch)
    parts = batch["reward_parts"]
    return pa.table(
        {
            "group": batch["group"],
            "completion": batch["completion"],
            "prompt_id": _cut(batch["prompt_id"]),
            "prompt": _prompts(batch["prompt"], group),
            "reward": _finite(reward),
            "parts": pc.if_else(pc.greater(pc.utf8_length(parts), 10 * TEXT), pa.scalar(None, pa.string()), parts),
            "length": pa.array(_sums(batch["mask"])),
            "finish_reason": _cut(batch["finish_reason"]),
            "failure": _cut(batch["failure"]),
            "trained": trained,
            "skipped": _cut(batch["skipped"]),
            "advantage": _finite(mean),
            "nonzero": pa.array(nonzero & np.asarray(trained)),
        }
    )


def _advantages(batch: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Mean advantage over the tokens of each completion, NaN if unknown, and whether any is not 0."""
    lists = batch["advantages"].combine_chunks()
    values, offsets = _floats(lists.values), _offsets(lists)
    with np.errstate(all="ignore"):
        mean = _totals(np.nan_to_num(values), offsets) / np.diff(offsets)
    return mean, _totals((values != 0) & ~np.isnan(values), offsets) > 0


def _prompts(column: pa.ChunkedArray, group: np.ndarray) -> pa.Array:
    """The shortened prompt of each row. Rows of a group that follow each other share it."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    texts = [shortened(column[int(start)].as_py() or "") for start in starts]
    sizes = np.diff(np.append(starts, len(group)))
    return pa.array(texts, pa.string()).take(pa.array(np.arange(len(starts)).repeat(sizes)))


def _groups(rows: pa.Table, step: int, threshold: float) -> pa.Table:
    """One row per group, from the rows of its completions in order."""
    group, reward = _integers(rows["group"]), _floats(rows["reward"])
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(np.append(starts, len(group)))
    known = ~np.isnan(reward)
    count = np.add.reduceat(known, starts, dtype=np.int64)
    with np.errstate(all="ignore"):
        mean = np.add.reduceat(np.where(known, reward, 0.0), starts) / count
        squares = np.where(known, (reward - mean.repeat(sizes)) ** 2, 0.0)
        std = np.where(count > 1, np.sqrt(np.add.reduceat(squares, starts) / (count - 1)), np.nan)
        best = np.fmax.reduceat(reward, starts)
    length = _integers(rows["length"])
    first = pa.array(starts)

    def total(values: np.ndarray) -> pa.Array:
        return pa.array(np.add.reduceat(values, starts, dtype=np.int64))

    return pa.table(
        {
            "step": pa.array(np.full(len(starts), step)),
            "group": pa.array(group[starts]),
            "draw": pa.array(step * MOST_GROUPS + group[starts]),
            "prompt_id": rows["prompt_id"].take(first),
            "prompt": rows["prompt"].take(first),
            "rewards": pa.ListArray.from_arrays(
                pa.array(np.append(starts, len(group)), pa.int32()), rows["reward"].combine_chunks()
            ),
            "mean": _finite(mean),
            "std": _finite(std),
            "best": _finite(best),
            "shortest": pa.array(np.minimum.reduceat(length, starts)),
            "longest": pa.array(np.maximum.reduceat(length, starts)),
            "completions": pa.array(sizes),
            "truncated": total(_truncated(rows)),
            "excluded": total(~known),
            "trained": total(np.asarray(rows["trained"])),
            "right": total(reward > threshold),
            "skipped": rows["skipped"].take(first),
            "nonzero": pa.array(np.logical_or.reduceat(np.asarray(rows["nonzero"]), starts)),
        }
    )


def _step(step: int, rows: pa.Table, groups: pa.Table, reward: np.ndarray, threshold: float) -> pa.Table:
    """One row about all completions of a step."""
    known = reward[~np.isnan(reward)]
    with np.errstate(all="ignore"):
        mean = np.array([known.mean()]) if len(known) else np.array([np.nan])
    return pa.table(
        {
            "step": [step],
            "groups": [len(groups)],
            "completions": [len(rows)],
            "mean": _finite(mean),
            "nonzero": [float(np.mean(np.asarray(groups["nonzero"])))],
            "length": [float(np.mean(_integers(rows["length"])))],
            "truncated": [int(_truncated(rows).sum())],
            "excluded": [len(reward) - len(known)],
            "right": [int((known > threshold).sum())],
        }
    )


def _truncated(rows: pa.Table) -> np.ndarray:
    return np.asarray(pc.equal(rows["finish_reason"], "length").fill_null(False))


def _finite(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=~np.isfinite(values))


def _integers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return np.asarray(column.fill_null(0))


def _floats(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The values as doubles; NaN for null and for what is not finite."""
    values = np.asarray(column.cast(pa.float64()).fill_null(np.nan))
    return np.where(np.isfinite(values), values, np.nan)


def _sums(column: pa.ChunkedArray) -> np.ndarray:
    """The number of true entries in each list, 0 for null: the sampled tokens of a mask."""
    lists = column.combine_chunks()
    return _totals(np.asarray(lists.values.fill_null(False)), _offsets(lists))


def _totals(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each list, 0 for an empty one; booleans are counted."""
    filled = np.diff(offsets) > 0
    totals = np.zeros(len(filled), np.int64 if values.dtype == bool else np.float64)
    if filled.any():
        totals[filled] = np.add.reduceat(values[: offsets[-1]], offsets[:-1][filled], dtype=totals.dtype)
    return totals


def _offsets(lists: Any) -> np.ndarray:
    return np.asarray(lists.offsets, np.int64)


def _cut(column: pa.ChunkedArray, most: int = TEXT) -> pa.ChunkedArray:
    return pc.utf8_slice_codeunits(column, 0, most)
