"""Several runs in one: overlaid curves, seeds of one recipe as a band, and what their recipes differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.runs.changes import differences
from gruppo.runs.eval_metrics import Question
from gruppo.ui.catalog import Card
from gruppo.ui.charts import AXES, CHARTS, POINTS, Axis, Chart, band_of, head, matching
from gruppo.ui.details import read_recipe
from gruppo.ui.live import LiveRun, thin
from gruppo.ui.queries import KINDS_OF_CHANGE

MOST = 12  # runs that are compared at once
_BAND = "The mean of the seeds; the band goes from the lowest to the highest seed."
_SEED = frozenset({"run.seed", "run.name"})  # fields in which seeds of one recipe differ


@dataclass(frozen=True)
class Compared:
    """A run that is compared. `recipe`: None if it is damaged."""

    card: Card
    live: LiveRun
    recipe: Recipe | None


def opened(cards: Sequence[tuple[Card, LiveRun]]) -> list[Compared]:
    """The runs with their recipes."""
    found = []
    for card, live in cards:
        try:
            recipe: Recipe | None = read_recipe(card.path)
        except UsageError:
            recipe = None
        found.append(Compared(card, live, recipe))
    return found


def labels(runs: Sequence[Compared]) -> list[str]:
    """A name for each run that no other one has: its name, or else its folder."""
    names = [run.card.name for run in runs]
    return [run.card.name if names.count(run.card.name) == 1 else run.card.folder for run in runs]


def seeds(runs: Sequence[Compared]) -> list[list[int]]:
    """The runs as groups, by number: runs whose recipes differ in nothing but run.seed and run.name are together."""
    groups: list[list[int]] = []
    for number, run in enumerate(runs):
        for group in groups:
            first = runs[group[0]].recipe
            if run.recipe is not None and first is not None and not _differences(first, run.recipe):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def pair(runs: Sequence[Compared], keys: Sequence[str] = ()) -> tuple[int, int] | None:
    """Two runs to compare question by question, by number; None if there are fewer than two.

    `keys`: the keys of the first and the second one. Where they name none, or one run twice: the first run, and the
    first one that is not a seed of the same recipe.
    """
    if len(runs) < 2:
        return None
    named = [next((number for number, run in enumerate(runs) if run.card.key == key), None) for key in (*keys, "", "")]
    first, second = named[0] or 0, named[1]
    if second is None or second == first:
        same = next(group for group in seeds(runs) if first in group)
        others = [number for number in range(len(runs)) if number != first]
        second = next((number for number in others if number not in same), others[0])
    return first, second


def _differences(first: Recipe, second: Recipe) -> list[str]:
    return [change.field for change in differences(first, second) if change.field not in _SEED]


def recipe_table(runs: Sequence[Compared]) -> list[tuple[str, list[Any]]]:
    """(field, its value in each run) for every field that is not the same in all runs. "recipe" if one is damaged."""
    first = next((run.recipe for run in runs if run.recipe is not None), None)
    if first is None:
        return []
    rows: dict[str, list[Any]] = {}
    for number, run in enumerate(runs):
        if run.recipe is None:
            rows.setdefault("recipe", [""] * len(runs))[number] = "damaged"
            continue
        for change in differences(first, run.recipe):
            rows.setdefault(change.field, [change.old] * len(runs))[number] = change.new
    return sorted(rows.items())


def payload(runs: Sequence[Compared], axis: str = "step", band: bool = True, points: int = POINTS) -> Mapping[str, Any]:
    """The charts of several runs, in the form of `gruppo.ui.charts.payload`: one metric per chart, one curve per run.

    `band`: seeds of one recipe are one curve, their mean, with a band from the smallest to the largest. A curve has at
    most `points` points, divided by the number of runs: a chart has as many as that of one run.
    """
    points //= max(1, len(runs))
    revisions = [run.live.poll() for run in runs]
    positions = [Axis(run.live, axis) for run in runs]
    groups = seeds(runs) if band else [[number] for number in range(len(runs))]
    names = sorted({name for run in runs for name in run.live.names()})
    charts, taken = [], set()
    for chart in CHARTS:
        found = matching(chart.names, names)
        taken |= {name for name, _ in found} | {end for name, _ in found for end in band_of(chart, name)}
        for number, (name, label) in enumerate(found):
            title = chart.title if number == 0 else f"{chart.title}: {label}"
            words = _BAND if any(len(group) > 1 for group in groups) else "" if chart.band else chart.help
            one = Chart(name, title, words, {}, unit=chart.unit, open=chart.open and number == 0)
            charts.append({**head(one), "curves": _curves(runs, groups, name, positions, points)})
    for name in sorted(set(names) - taken):
        one = Chart(name, name, "", {}, open=False)
        charts.append({**head(one), "curves": _curves(runs, groups, name, positions, points)})
    return {
        "revision": " ".join(revisions), "axis": positions[0].name if positions else "step", "axes": AXES,
        "points": points, "charts": charts, "events": [],
    }  # fmt: skip


def _curves(
    runs: Sequence[Compared], groups: Sequence[Sequence[int]], name: str, positions: Sequence[Axis], points: int
) -> list[dict[str, Any]]:
    words, curves = labels(runs), []
    for color, group in enumerate(groups):
        arrays = [(runs[n].live.arrays((name,))[name], positions[n]) for n in group if name in runs[n].live.names()]
        if not arrays:
            continue
        label = words[group[0]] if len(group) == 1 else f"{words[group[0]]} ({len(arrays)} seeds)"
        shared = {"name": name, "label": label, "run": str(color), "color": color, "dash": color}
        if len(arrays) == 1:
            (steps, values), position = arrays[0]
            curves.append({**shared, **thin(position(steps), values, points)})
        else:
            curves.append({**shared, **_mean(arrays, points)})
    return curves


def _mean(arrays: Sequence[tuple[tuple[np.ndarray, np.ndarray], Axis]], points: int) -> dict[str, Any]:
    """The mean over seeds at every step that all of them have, with the smallest and the largest as a band.

    The position of a step is the mean of its positions in the runs.
    """
    lasts = [_last_of_each(steps, found) for (steps, found), _ in arrays]
    common = lasts[0][0]
    for steps, _ in lasts[1:]:
        common = np.intersect1d(common, steps, assume_unique=True)
    if not len(common):
        return thin(common, np.zeros(0), points)
    values = [found[np.searchsorted(steps, common)] for steps, found in lasts]
    places = [np.asarray(position(common), dtype=np.float64) for _, position in arrays]
    table, where = np.array(values), np.mean(places, axis=0)
    whole = where.astype(np.int64) if np.array_equal(where, common) else where
    with np.errstate(over="ignore"):
        mean = thin(whole, table.mean(axis=0), points)
    mean["band"] = [thin(whole, table.min(axis=0), points), thin(whole, table.max(axis=0), points)]
    return mean


def _last_of_each(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps in order, each once, and the last value of each."""
    found, places = np.unique(steps[::-1], return_index=True)
    return found, values[::-1][places]


def question_changes(
    first: Sequence[Question], second: Sequence[Question]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """How two evaluations differ, in the form of `Index.changes`: the second against the first, by prompt id.

    The rows that differ come first.
    """
    others = {question.id: question for question in second}
    counts = dict.fromkeys(KINDS_OF_CHANGE, 0)
    rows: list[dict[str, Any]] = []
    for one in first:
        other = others.pop(one.id, None)
        before, after = (None if question is None else _share(question) for question in (one, other))
        rows.append({"prompt_id": one.id, "question": None, "before": before, "after": after,
                     "kind": _kind(before, after)})  # fmt: skip
    for question in others.values():
        rows.append({"prompt_id": question.id, "question": None, "before": None, "after": _share(question),
                     "kind": _kind(None, 0.0)})  # fmt: skip
    for row in rows:
        counts[row["kind"]] += 1
    rows.sort(key=lambda row: KINDS_OF_CHANGE.index(row["kind"]))
    return counts, rows


def _share(question: Question) -> float:
    return sum(question.correct) / len(question.correct)


def _kind(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not in both"
    if before > 0.5:
        return "still right" if after > 0.5 else "broken"
    return "fixed" if after > 0.5 else "still wrong"
