"""Several runs in one: seeds, what their recipes differ in, their curves, and their answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gruppo.runs.eval_metrics import Question, compare
from gruppo.ui.catalog import Catalog
from gruppo.ui.comparing import Compared, labels, opened, pair, payload, question_changes, recipe_table, seeds
from gruppo.ui.live import LiveRun
from tests.ui.made import make_run

RECIPE = """
[run]
name = "{name}"
seed = {seed}
steps = 10

[model]
name = "some/model"

[task]
name = "arithmetic"

[optimizer]
learning_rate = {rate}
"""


def runs(root: Path, *made: Mapping[str, Any]) -> list[Compared]:
    """Runs in the order in which they are given: {"name", "seed", "rate", "metrics", "recipe"}."""
    for number, one in enumerate(made):
        fields = {"name": f"run{number}", "seed": 0, "rate": 1e-6} | one
        recipe = one.get("recipe", RECIPE.format(**{name: fields[name] for name in ("name", "seed", "rate")}))
        make_run(root / f"folder{number}", recipe, one.get("metrics", ()))
    cards = sorted(Catalog(root).cards(), key=lambda card: card.folder)
    found = opened([(card, LiveRun(card.path)) for card in cards])
    for run in found:
        run.live.poll()
    return found


def curves(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    json.dumps(found, allow_nan=False)
    return next(chart["curves"] for chart in found["charts"] if chart["id"] == name)  # type: ignore[no-any-return]


def values(metric: str, *numbers: float | None, first: int = 1) -> list[dict[str, Any]]:
    return [{"step": step, metric: number} for step, number in enumerate(numbers, start=first)]


def test_seeds_are_runs_that_differ_in_seed_and_name_alone(tmp_path: Path) -> None:
    found = runs(tmp_path, {"seed": 0}, {"rate": 1e-5}, {"seed": 1}, {"rate": 1e-5, "seed": 1}, {"seed": 2})
    assert seeds(found) == [[0, 2, 4], [1, 3]]


def test_a_run_with_a_damaged_recipe_is_nobodys_seed(tmp_path: Path) -> None:
    found = runs(tmp_path, {"recipe": "[run"}, {"recipe": "[run"}, {})
    assert [run.recipe is None for run in found] == [True, True, False]
    assert seeds(found) == [[0], [1], [2]]
    assert recipe_table(found) == [("recipe", ["damaged", "damaged", ""])]
    assert recipe_table(found[:2]) == []


def test_what_recipes_differ_in(tmp_path: Path) -> None:
    found = runs(tmp_path, {}, {"seed": 3}, {"rate": 1e-5})
    assert recipe_table(found) == [
        ("optimizer.learning_rate", [1e-6, 1e-6, 1e-5]),
        ("run.name", ["run0", "run1", "run2"]),
        ("run.seed", [0, 3, 0]),
    ]
    assert recipe_table(found[:1]) == []


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path) -> None:
    found = runs(tmp_path, {"name": "same"}, {"name": "other"}, {"name": "same"})
    assert labels(found) == ["folder0", "other", "folder2"]


# ---------------------------------------------------------------- curves


def test_seeds_are_a_mean_with_a_band_from_lowest_to_highest(tmp_path: Path) -> None:
    metric = "policy/kl"
    found = runs(
        tmp_path,
        {"seed": 0, "metrics": values(metric, 1.0, 2.0, 3.0)},
        {"seed": 1, "metrics": values(metric, 3.0, 6.0)},
        {"rate": 1e-5, "metrics": values(metric, 9.0, 9.0, 9.0, 9.0)},
    )
    both, other = curves(payload(found), metric)
    assert (both["label"], both["x"], both["y"]) == ("run0 (2 seeds)", [1, 2], [2, 4])
    assert [(end["x"], end["y"]) for end in both["band"]] == [([1, 2], [1, 2]), ([1, 2], [3, 6])]
    assert (other["label"], other["y"], "band" in other) == ("run2", [9] * 4, False)
    assert other["color"] != both["color"]
    single = curves(payload(found, band=False), metric)
    assert [curve["label"] for curve in single] == ["run0", "run1", "run2"]


def test_a_seed_without_a_value_leaves_a_gap(tmp_path: Path) -> None:
    found = runs(
        tmp_path, {"seed": 0, "metrics": values("a", 1.0, None)}, {"seed": 1, "metrics": values("a", 3.0, 4.0)}
    )
    (curve,) = curves(payload(found), "a")
    assert (curve["y"], [end["y"] for end in curve["band"]]) == ([2, None], [[1, None], [3, None]])


def test_seeds_without_a_common_step_have_no_curve(tmp_path: Path) -> None:
    found = runs(tmp_path, {"seed": 0, "metrics": values("a", 1.0)}, {"seed": 1, "metrics": values("a", 3.0, first=7)})
    (curve,) = curves(payload(found), "a")
    assert (curve["x"], curve["y"]) == ([], [])


def test_runs_are_compared_by_tokens_and_time(tmp_path: Path) -> None:
    def steps(seconds: float) -> list[dict[str, Any]]:
        return [{"step": step, "a": float(step), "time/step": seconds, "time/generate": 1.0,
                 "time/tokens_per_second": 100.0 * seconds} for step in (1, 2)]  # fmt: skip

    found = runs(tmp_path, {"seed": 0, "metrics": steps(3600.0)}, {"seed": 1, "metrics": steps(7200.0)})
    assert curves(payload(found, "tokens"), "a")[0]["x"] == [540_000, 1_080_000]
    assert curves(payload(found, "time"), "a")[0]["x"] == [1.5, 3]
    separate = curves(payload(found, "time", band=False), "a")
    assert [curve["x"] for curve in separate] == [[1, 2], [2, 4]]


def test_every_metric_has_a_chart_of_its_own(tmp_path: Path) -> None:
    line = {"step": 1, "reward/mean": 1.0, "reward/f/mean": 0.5, "eval/accuracy": 0.5, "eval/accuracy_low": 0.4,
            "eval/accuracy_high": 0.6, "own": 1.0}  # fmt: skip
    found = payload(runs(tmp_path, {"metrics": [line]}))
    assert [(chart["id"], chart["open"]) for chart in found["charts"]] == [
        ("reward/mean", True), ("reward/f/mean", False), ("eval/accuracy", True), ("own", False),
    ]  # fmt: skip
    assert found["events"] == []


def test_extremes_of_strangers_stay_numbers(tmp_path: Path) -> None:
    metrics = values("a", 1.7e308, -1.7e308, math.nan)
    found = runs(tmp_path, {"seed": 0, "metrics": metrics}, {"seed": 1, "metrics": metrics})
    for axis in ("step", "tokens", "time"):
        curves(payload(found, axis), "a")


def test_no_runs_have_no_charts() -> None:
    assert payload([])["charts"] == []


# ---------------------------------------------------------------- answers


def test_two_runs_are_compared_by_default_if_they_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    found = runs(tmp_path, {"seed": 0}, {"seed": 1}, {"rate": 1e-5})
    keys = [run.card.key for run in found]
    assert pair(found) == (0, 2)
    assert pair(found[:2]) == (0, 1)
    assert pair(found[:1]) is None
    assert pair(found, (keys[2], keys[1])) == (2, 1)
    assert pair(found, (keys[1], keys[1])) == (1, 2)
    assert pair(found, ("", keys[0])) == (0, 2)
    assert pair(found, ("unknown", "unknown")) == (0, 2)


def asked(prompt: str, *correct: bool) -> Question:
    return Question(prompt, "", correct, [str(one) for one in correct])


def test_questions_of_two_runs() -> None:
    first = [asked("a", True), asked("b", False), asked("c", True), asked("d", False), asked("e", True)]
    second = [asked("b", True), asked("a", True), asked("c", False), asked("d", True, False), asked("f", True)]
    counts, rows = question_changes(first, second)
    assert counts == {"fixed": 1, "broken": 1, "still wrong": 1, "still right": 1, "not in both": 2}
    assert [(row["prompt_id"], row["kind"]) for row in rows] == [
        ("b", "fixed"), ("c", "broken"), ("d", "still wrong"), ("a", "still right"), ("e", "not in both"),
        ("f", "not in both"),
    ]  # fmt: skip
    shares = {row["prompt_id"]: (row["before"], row["after"]) for row in rows}
    assert shares["d"] == (0, 0.5)
    assert shares["e"] == (1, None)
    assert shares["f"] == (None, 1)


def test_the_counts_agree_with_the_paired_difference() -> None:
    random = np.random.default_rng(0)
    first, second = ([asked(str(n), bool(right)) for n, right in enumerate(random.random(200) < share)]
                     for share in (0.4, 0.6))  # fmt: skip
    counts, _ = question_changes(first, second)
    test = compare(first, second)
    assert test["difference"] == pytest.approx((counts["fixed"] - counts["broken"]) / 200)
    assert (test["second_only"], test["first_only"]) == (counts["fixed"], counts["broken"])


def test_no_questions_at_all() -> None:
    counts, rows = question_changes([], [])
    assert rows == []
    assert set(counts.values()) == {0}
