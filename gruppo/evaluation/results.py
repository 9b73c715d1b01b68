"""Results of an evaluation: questions and figures by evaluation set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gruppo import __version__
from gruppo.evaluation.metrics import figures_of
from gruppo.runs.eval_metrics import Question, questions_of
from gruppo.runs.tables import EVALUATIONS

NEEDED_COLUMNS = pa.schema(
    [
        EVALUATIONS.field(name)
        for name in (
            "eval_set", "prompt_id", "question", "answer", "correct", "extracted", "rule", "other_rules", "vote",
            "score", "finish_reason", "sample",
        )
    ]
)  # fmt: skip


RESULTS = "results.json"


HELD_OUT = "held-out"  # display name of a run's own evaluation set, whose name is ""


@dataclass(frozen=True)
class SetResult:
    """Results of one evaluation set: its questions, and its figures as in results.json."""

    questions: list[Question]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class EvalResult:
    """Results of one model, by evaluation set. `path`: the evaluation folder, if there is one."""

    model: str
    sets: dict[str, SetResult]
    path: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        figures = {name: dict(result.figures) for name, result in self.sets.items()}
        return {"model": self.model, "gruppo": __version__, "sets": figures}


def sets_of(tables: Sequence[pa.Table], extra: Mapping[str, Mapping[str, Any]]) -> dict[str, SetResult]:
    """The results of every evaluation set, from its rows.

    `extra`: figures that cannot be computed from the rows, by set name.
    """
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for table in tables:
        for row in table.to_pylist():
            rows[row["eval_set"]].append(row)
    return {
        name or HELD_OUT: SetResult(questions_of(rows[name]), {**figures, **figures_of(rows[name])})
        for name, figures in extra.items()
    }
