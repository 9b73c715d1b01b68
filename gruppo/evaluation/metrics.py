"""Metrics of graded answers that read their texts; those of verdicts alone are in `gruppo.runs.eval_metrics`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.rewards.grading.last_number import last_number
from gruppo.runs.eval_metrics import figures, questions_of


def ambiguous(row: Mapping[str, Any]) -> bool:
    """Whether another extraction rule grades the row's answer differently (ambiguous answer extraction)."""
    return any(other != row["correct"] for other in json.loads(row["other_rules"]).values())


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`figures` of the questions in the rows, and shares of answers.

    The shares: finished (EOS), if the finish reasons are known; contains a number; contains an answer; ambiguous answer
    extraction.
    """
    finished = [row["finish_reason"] == "stop" for row in rows if row["finish_reason"]]
    shares = {"finished_share": sum(finished) / len(finished)} if finished else {}
    return figures(questions_of(rows)) | {
        **shares,
        "number_share": sum(last_number(row["answer"]) is not None for row in rows) / len(rows),
        "answered_share": sum(row["vote"] is not None for row in rows) / len(rows),
        "ambiguous_share": sum(map(ambiguous, rows)) / len(rows),
    }
