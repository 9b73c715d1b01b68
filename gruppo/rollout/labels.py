"""Labelled completions, and their table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.sections import RewardModel
from gruppo.errors import UsageError
from gruppo.rollout.reward_model import Sample, last_token
from gruppo.runs.reading import read_table, reading
from gruppo.runs.tables import LABELS
from gruppo.types import Completion, Prompt, Steps
from gruppo.utils.text import as_json

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class LabelledCompletion:
    """A completion, whether it is right, and of each of its steps the last token (counted from 0), where it ends in the
    text, and the share of the completions from there that are right."""

    prompt: Prompt
    completion: Completion
    right: bool
    ends: tuple[int, ...] = ()
    text_ends: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    def sample(self, settings: RewardModel) -> Sample:
        """As a reward model of these settings learns from it."""
        if settings.kind == "outcome":
            ends = last_token(self.completion)
            return Sample(self.prompt, self.completion, self.right, Steps((float(self.right),) * len(ends), ends))
        hard = settings.labels == "hard"
        values = tuple(float(share > 0) if hard else share for share in self.shares)
        return Sample(self.prompt, self.completion, self.right, Steps(values, self.ends))


def label_rows(labels: Iterable[LabelledCompletion]) -> list[dict[str, Any]]:
    """A row a completion, in the columns of `gruppo.runs.tables.LABELS`."""
    rows = []
    for each in labels:
        text = each.completion.text
        starts = (0, *each.text_ends)
        rows.append(
            {
                "prompt_id": each.prompt.id,
                "prompt": as_json(each.prompt.content),
                "columns": as_json(dict(each.prompt.columns)),
                "prompt_token_ids": list(each.prompt.token_ids),
                "text": text,
                "token_ids": list(each.completion.token_ids),
                "finish_reason": each.completion.finish_reason,
                "right": each.right,
                "step_texts": [text[start:end] for start, end in zip(starts, each.text_ends, strict=False)],
                "step_ends": list(each.ends),
                "step_text_ends": list(each.text_ends),
                "soft": list(each.shares),
                "hard": [share > 0 for share in each.shares],
            }
        )
    return rows


def read_labels(files: Iterable[Path]) -> list[LabelledCompletion]:
    """The completions of tables that `label_rows` made, in order. Raises UsageError for another file."""
    made = []
    for file in files:
        try:
            rows = read_table(file, LABELS).to_pylist()
        except (OSError, UsageError) as error:
            why = str(error).splitlines()[0]
            raise UsageError(f"{file}: is no table of labels ({why}); give one that `gruppo label` wrote") from None
        with reading(file, "give one that `gruppo label` wrote"):
            made += [_labelled(row) for row in rows]
    return made


def _labelled(row: Mapping[str, Any]) -> LabelledCompletion:
    ids, size = tuple(row["token_ids"]), len(row["token_ids"])
    completion = Completion(ids, (0.0,) * size, (True,) * size, row["finish_reason"], 0, row["text"])
    content, columns = json.loads(row["prompt"]), json.loads(row["columns"])
    prompt = Prompt(row["prompt_id"], content, tuple(row["prompt_token_ids"]), "", columns)
    ends, text_ends, shares = (tuple(row[name]) for name in ("step_ends", "step_text_ends", "soft"))
    if not len(ends) == len(text_ends) == len(shares) or not all(0 <= end < size for end in ends):
        raise ValueError(f"the steps of {row['prompt_id']} do not fit its completion")
    return LabelledCompletion(prompt, completion, bool(row["right"]), ends, text_ends, shares)
