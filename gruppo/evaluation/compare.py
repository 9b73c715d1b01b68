"""Comparison of two evaluations, paired by question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gruppo.config.renames import RESULTS as RENAMED
from gruppo.errors import UsageError
from gruppo.evaluation.results import HELD_OUT, NEEDED_COLUMNS, RESULTS, EvalResult, sets_of
from gruppo.runs.eval_metrics import compare
from gruppo.runs.reading import read_object, read_table, require_own


def read_evaluation(folder: Path) -> EvalResult:
    """Read a finished evaluation from its folder.

    Raises UsageError if the folder contains no finished evaluation, or a damaged one.
    """
    require_own(folder)
    if not (folder / RESULTS).is_file():
        raise UsageError(f"{folder}: contains no finished evaluation; run its command again with --resume")
    content = {RENAMED.get(name, name): value for name, value in read_object(folder / RESULTS).items()}
    figures: Any = content.get("sets")
    model: Any = content.get("model")
    if (
        not isinstance(model, str)
        or not isinstance(figures, dict)
        or any(type(value) is not dict for value in figures.values())
    ):
        raise UsageError(f"{folder / RESULTS}: is damaged; evaluate again with another --out")
    if not (folder / "samples.parquet").is_file() and any((folder / "evaluations").glob("step-*.parquet")):
        raise UsageError(
            f"{folder}: samples.parquet is missing; delete results.json and run the command again with --resume, which "
            "writes both from the answers in evaluations/"
        )
    table = read_table(folder / "samples.parquet", NEEDED_COLUMNS)
    set_names = {name or HELD_OUT: name for name in table["eval_set"].to_pylist()}
    if set(set_names) != set(figures):
        raise UsageError(
            f"{folder / RESULTS}: its evaluation sets differ from those of samples.parquet; evaluate again with "
            "another --out"
        )
    extra = {set_names[name]: _extra_figures(figures[name]) for name in figures}
    return EvalResult(model, sets_of([table], extra), folder)


def _extra_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that cannot be computed from the rows."""
    return {name: figures[name] for name in ("domain", "decoding", "unanswered") if name in figures}


def compare_all(first: EvalResult, second: EvalResult) -> dict[str, dict[str, Any]]:
    """Differences (second - first) for each evaluation set that both have, by set name.

    See `gruppo.runs.eval_metrics.compare`. Raises UsageError if they have no set in common.
    """
    shared = [name for name in first.sets if name in second.sets]
    if not shared:
        listed = [f"{result.model} has {', '.join(result.sets)}" for result in (first, second)]
        raise UsageError(f"nothing to compare: {'; '.join(listed)}; evaluate both on one task")
    differences = {}
    for name in shared:
        one, other = first.sets[name], second.sets[name]
        settings = _differing_settings(one.figures, other.figures)
        differences[name] = compare(one.questions, other.questions) | {"settings": settings}
    return differences


def _differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two results, as text."""
    one, other = ({"samples": figures["samples"], **figures.get("decoding", {})} for figures in (first, second))
    names = sorted(name for name in one.keys() & other.keys() if one[name] != other[name])
    return [f"{name} {one[name]} and {other[name]}" for name in names]
