"""What an evaluation came to: questions and figures by evaluation set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gruppo import __version__
from gruppo.evaluation.metrics import Question, figures_of, questions_of
from gruppo.runs.tables import EVALUATIONS

NEEDED_COLUMNS = pa.schema(
    [
        EVALUATIONS.field(name)
        for name in (
            "eval_set", "prompt_id", "question", "answer", "correct", "extracted", "rule", "other_rules", "vote", "score",
            "finish_reason", "sample",
        )
    ]
)  # fmt: skip


RESULTS = "results.json"


HELD_OUT = "held-out"  # what a run's own exam, which has no name, is called beside others


@dataclass(frozen=True)
class SetResult:
    """What was answered in an exam: its questions, and the figures of results.json."""

    questions: list[Question]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class EvalResult:
    """The exams of a model, by name. `path`: the folder, if there is one."""

    model: str
    sheets: dict[str, SetResult]
    path: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        exams = {name: dict(sheet.figures) for name, sheet in self.sheets.items()}
        return {"model": self.model, "gruppo": __version__, "sets": exams}


def sets_of(tables: Sequence[pa.Table], beside: Mapping[str, Mapping[str, Any]]) -> dict[str, SetResult]:
    """The rows of every exam as questions, with their figures, and `beside` them what no row tells."""
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for table in tables:
        for row in table.to_pylist():
            held[row["eval_set"]].append(row)
    return {
        name or HELD_OUT: SetResult(questions_of(held[name]), {**told, **figures_of(held[name])})
        for name, told in beside.items()
    }
