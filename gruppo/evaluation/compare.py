"""Two evaluations compared, question by question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gruppo.config.renames import RESULTS as RENAMED
from gruppo.errors import UsageError
from gruppo.evaluation.metrics import compare
from gruppo.evaluation.results import HELD_OUT, NEEDED_COLUMNS, RESULTS, EvalResult, sets_of
from gruppo.runs.reading import read_object, read_table, require_own


def read_evaluation(folder: Path) -> EvalResult:
    """An evaluation that is done, from its folder. Raises UsageError where it holds none, or a damaged one."""
    require_own(folder)
    if not (folder / RESULTS).is_file():
        raise UsageError(f"{folder}: holds no evaluation that is finished; repeat its command with --resume")
    held = {RENAMED.get(name, name): value for name, value in read_object(folder / RESULTS).items()}
    exams: Any = held.get("sets")
    model: Any = held.get("model")
    if (
        not isinstance(model, str)
        or not isinstance(exams, dict)
        or any(type(each) is not dict for each in exams.values())
    ):
        raise UsageError(f"{folder / RESULTS}: is damaged; evaluate again with another --out")
    table = read_table(folder / "samples.parquet", NEEDED_COLUMNS)
    there = {name or HELD_OUT: name for name in table["eval_set"].to_pylist()}
    if set(there) != set(exams):
        raise UsageError(
            f"{folder / RESULTS}: is of other exams than samples.parquet; evaluate again into another --out"
        )
    return EvalResult(model, sets_of([table], {there[name]: _beside(exams[name]) for name in exams}), folder)


def _beside(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("domain", "decoding", "unanswered") if name in figures}


def compare_all(first: EvalResult, second: EvalResult) -> dict[str, dict[str, Any]]:
    """The second's figures less the first's, by the name of each exam that both held; see `gruppo.evaluation.metrics.compare`.
    Raises UsageError where they held none in common."""
    shared = [name for name in first.sheets if name in second.sheets]
    if not shared:
        held = [f"{each.model} has {', '.join(each.sheets)}" for each in (first, second)]
        raise UsageError(f"nothing to compare: {'; '.join(held)}; evaluate both on one task")
    made = {}
    for name in shared:
        one, other = first.sheets[name], second.sheets[name]
        made[name] = compare(one.questions, other.questions) | {"settings": _apart(one.figures, other.figures)}
    return made


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """In which settings two exams differ, in words."""
    one, other = ({"samples": each["samples"], **each.get("decoding", {})} for each in (first, second))
    names = sorted(name for name in one.keys() & other.keys() if one[name] != other[name])
    return [f"{name} {one[name]} and {other[name]}" for name in names]
