"""Labeled completions and the table they are stored in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.config.sections import RewardModel
from gruppo.errors import UsageError
from gruppo.rollout.reward_model import Sample, last_token
from gruppo.runs.reading import read_table, reading
from gruppo.runs.tables import LABELS
from gruppo.types import Completion, Prompt, Steps
from gruppo.utils.text import as_json


@dataclass(frozen=True)
class LabelledCompletion:
    """A completion with labels for its outcome and its steps.

    `right`: the completion is correct. For each step, `ends` is the index of its last token (counted from 0),
    `text_ends` the character offset in the text at which the step ends, and `shares` the share of the continuations
    sampled from there that are correct. `continuation_tokens`: the tokens of all continuations together.
    """

    prompt: Prompt
    completion: Completion
    right: bool
    ends: tuple[int, ...] = ()
    text_ends: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    continuation_tokens: int = 0

    def sample(self, settings: RewardModel) -> Sample:
        """The training sample for a reward model with these settings."""
        if settings.kind == "outcome":
            ends = last_token(self.completion)
            return Sample(self.prompt, self.completion, self.right, Steps((float(self.right),) * len(ends), ends))
        hard = settings.labels == "hard"
        values = tuple(float(share > 0) if hard else share for share in self.shares)
        return Sample(self.prompt, self.completion, self.right, Steps(values, self.ends))


def label_rows(labels: Iterable[LabelledCompletion]) -> list[dict[str, Any]]:
    """One row per completion, in the columns of `gruppo.runs.tables.LABELS`."""
    rows = []
    for label in labels:
        text = label.completion.text
        starts = (0, *label.text_ends)
        rows.append(
            {
                "prompt_id": label.prompt.id,
                "prompt": as_json(label.prompt.content),
                "columns": as_json(dict(label.prompt.columns)),
                "prompt_token_ids": list(label.prompt.token_ids),
                "text": text,
                "token_ids": list(label.completion.token_ids),
                "finish_reason": label.completion.finish_reason,
                "right": label.right,
                "step_texts": [text[start:end] for start, end in zip(starts, label.text_ends, strict=False)],
                "step_ends": list(label.ends),
                "step_text_ends": list(label.text_ends),
                "soft": list(label.shares),
                "hard": [share > 0 for share in label.shares],
                "continuation_tokens": label.continuation_tokens,
            }
        )
    return rows


def read_labels(files: Iterable[Path]) -> list[LabelledCompletion]:
    """Read tables written with `label_rows`, in order. Raises UsageError if a file is not such a table."""
    labels = []
    for file in files:
        try:
            rows = read_table(file, LABELS).to_pylist()
        except (OSError, UsageError) as error:
            why = str(error).splitlines()[0]
            raise UsageError(f"{file}: is not a table of labels ({why}); give one that `gruppo label` wrote") from None
        with reading(file, "give one that `gruppo label` wrote"):
            labels += [_read_label(row) for row in rows]
    return labels


def _read_label(row: Mapping[str, Any]) -> LabelledCompletion:
    ids, size = tuple(row["token_ids"]), len(row["token_ids"])
    completion = Completion(ids, (0.0,) * size, (True,) * size, row["finish_reason"], 0, row["text"])
    content, columns = json.loads(row["prompt"]), json.loads(row["columns"])
    prompt = Prompt(row["prompt_id"], content, tuple(row["prompt_token_ids"]), "", columns)
    ends, text_ends, shares = (tuple(row[name]) for name in ("step_ends", "step_text_ends", "soft"))
    if not len(ends) == len(text_ends) == len(shares) or not all(0 <= end < size for end in ends):
        raise ValueError(f"the steps of {row['prompt_id']} do not match its completion")
    continued = row["continuation_tokens"] or 0  # older tables have none
    return LabelledCompletion(prompt, completion, bool(row["right"]), ends, text_ends, shares, continued)
