"""The curves of a run: where each metric is drawn, along which axis, with which marks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gruppo.ui.charts import CHARTS, Axis, matching, payload
from gruppo.ui.live import LiveRun
from tests.ui.made import make_run

EXAMPLES = {"name": "exact_match", "task": "gsm8k", "figure": "accuracy", "NAME": "gsm8k"}


def run(folder: Path, *metrics: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> LiveRun:
    live = LiveRun(make_run(folder, metrics=metrics, events=events))
    live.poll()
    return live


def charts(live: LiveRun, **options: Any) -> dict[str, dict[str, Any]]:
    """The charts by id, as a page gets them."""
    found = json.loads(json.dumps(payload(live, **options), allow_nan=False))
    return {chart["id"]: chart for chart in found["charts"]}


def documented() -> list[str]:
    """The metrics that docs/metrics.md names, with an example for every placeholder."""
    text = Path("docs/metrics.md").read_text(encoding="utf-8").partition("## Older run folders")[0]
    names = []
    for line in text.splitlines():
        if line.startswith("| `"):
            names += re.findall(r"`([^`]+)`", line.split("|")[1])
    filled = [re.sub(r"<(\w+)>", lambda found: EXAMPLES[found[1]], name) for name in names]
    return [name.replace("NAME", EXAMPLES["NAME"]).replace("@k", "@4").replace("…", "accuracy") for name in filled]


def test_every_documented_metric_is_drawn_once(tmp_path: Path) -> None:
    names = documented()
    assert len(names) > 80
    found = charts(run(tmp_path, *({"step": step, **dict.fromkeys(names, float(step))} for step in (1, 2))))
    drawn = [curve["name"] for chart in found.values() for curve in chart["curves"]]
    assert len(drawn) == len(set(drawn))
    metrics = {("low", "high"): ("eval/accuracy", "eval/gsm8k/accuracy"),
               ("min", "max"): ("completion/length", "policy/ratio")}  # fmt: skip
    intervals = {f"{metric}_{end}" for ends, several in metrics.items() for metric in several for end in ends}
    assert set(names) - set(drawn) <= intervals | {"reward/exact_match/mean"}
    banded = [chart for chart in found.values() if any("band" in curve for curve in chart["curves"])]
    assert {chart["id"] for chart in banded} == {"accuracy", "length", "ratio"}


def test_every_metric_that_a_chart_names_is_documented() -> None:
    names = [*documented(), "reward/log/x", "reward/task/gsm8k/mean"]
    for chart in CHARTS:
        for pattern in chart.names:
            assert any(re.fullmatch(pattern, name) for name in names), f"{chart.id}: {pattern}"


def test_a_metric_that_no_chart_names_has_one_of_its_own_at_the_end(tmp_path: Path) -> None:
    found = charts(run(tmp_path, {"step": 1, "a/b": 1.0, "policy/kl": 0.5, "zz": None}))
    assert list(found) == ["kl", "a/b", "zz"]
    assert (found["a/b"]["other"], found["a/b"]["open"]) == (True, False)
    assert found["a/b"]["curves"] == [{"name": "a/b", "label": "b", "x": [1], "y": [1], "size": 1}]
    assert found["zz"]["curves"][0]["y"] == [None]


def test_rewards_are_together_and_named(tmp_path: Path) -> None:
    names = ("reward/mean", "reward/math/mean", "reward/task/gsm8k/mean", "reward/log/steps", "reward/math/std")
    found = charts(run(tmp_path, {"step": 1, **{name: float(place) for place, name in enumerate(names)}}))
    assert {curve["name"]: curve["label"] for curve in found["reward"]["curves"]} == {
        "reward/mean": "reward", "reward/math/mean": "math", "reward/task/gsm8k/mean": "task/gsm8k",
    }  # fmt: skip
    assert "reward/log/steps" in found


def test_the_only_reward_function_is_not_drawn_twice(tmp_path: Path) -> None:
    lines = [{"step": step, "reward/mean": value, "reward/f/mean": value} for step, value in ((1, 0.5), (2, None))]
    assert len(charts(run(tmp_path / "same", *lines))["reward"]["curves"]) == 1
    lines[0]["reward/f/mean"] = 0.25
    assert len(charts(run(tmp_path / "weighted", *lines))["reward"]["curves"]) == 2


def test_accuracy_of_every_set_has_its_interval(tmp_path: Path) -> None:
    line = {f"eval/{prefix}accuracy{end}": value for prefix in ("", "gsm8k/")
            for end, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))}  # fmt: skip
    curves = charts(run(tmp_path, {"step": 2, **line, "eval/math/accuracy": 0.1}))["accuracy"]["curves"]
    assert [curve["label"] for curve in curves] == ["held out", "gsm8k", "math"]
    assert [[end["y"] for end in curve.get("band", [])] for curve in curves] == [[[0.4], [0.6]], [[0.4], [0.6]], []]


def test_phases_are_stacked(tmp_path: Path) -> None:
    found = charts(run(tmp_path, {"step": 1, "time/generate": 1.0, "time/update": 2.0}))["phases"]
    assert (found["kind"], found["unit"]) == ("stack", "seconds")
    assert [curve["label"] for curve in found["curves"]] == ["sampling", "update"]


# ---------------------------------------------------------------- axes

LINES = (
    {"step": 0, "eval/accuracy": 0.1, "time/evaluate": 3600.0},
    {"step": 1, "completion/length": 5.0, "time/step": 3600.0, "time/generate": 2.0, "time/tokens_per_second": 100.0},
    {"step": 2, "completion/length": 5.0, "time/step": 1800.0, "time/generate": 1.0, "time/tokens_per_second": 50.0},
    {"step": 2, "eval/accuracy": 0.5, "time/evaluate": 1800.0},
    {"step": 3, "completion/length": 5.0, "time/step": None},
)


def test_an_axis_of_sampled_tokens(tmp_path: Path) -> None:
    found = charts(run(tmp_path, *LINES), axis="tokens")
    assert found["length"]["curves"][0]["x"] == [200, 250, 250]
    assert found["accuracy"]["curves"][0]["x"] == [0, 250]


def test_an_axis_of_hours_counts_evaluations(tmp_path: Path) -> None:
    found = charts(run(tmp_path, *LINES), axis="time")
    assert found["length"]["curves"][0]["x"] == [2, 3, 3]
    assert found["accuracy"]["curves"][0]["x"] == [1, 3]


def test_an_unknown_axis_is_that_of_steps(tmp_path: Path) -> None:
    live = run(tmp_path, *LINES)
    assert payload(live, axis="nothing")["axis"] == "step"
    assert charts(live, axis="nothing")["length"]["curves"][0]["x"] == [1, 2, 3]


def test_steps_between_recorded_ones_are_where_the_one_before_is(tmp_path: Path) -> None:
    axis = Axis(run(tmp_path, *LINES), "tokens")
    assert axis(np.array([-5, 0, 1, 2, 99])).tolist() == [0, 0, 200, 250, 250]


def test_a_run_without_steps_is_at_0(tmp_path: Path) -> None:
    axis = Axis(run(tmp_path, {"step": 3, "a": 1.0}), "time")
    assert axis(np.array([1, 3])).tolist() == [0, 0]


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
@pytest.mark.parametrize("value", [1e308, -1e308, "x", None, True])
def test_axes_of_strangers_are_numbers_of_json(tmp_path: Path, axis: str, value: Any) -> None:
    names = ("completion/length", "time/step", "time/generate", "time/tokens_per_second", "time/evaluate", "policy/kl")
    live = run(tmp_path, *({"step": step, **dict.fromkeys(names, value), "a": 1.0} for step in (1, 2, 3)))
    xs = charts(live, axis=axis)["a"]["curves"][0]["x"]
    assert xs == sorted(xs)


# ---------------------------------------------------------------- ranges and marks


def test_a_range_of_steps(tmp_path: Path) -> None:
    live = run(tmp_path, *({"step": step, "a": float(step)} for step in range(1, 11)))
    assert charts(live, first=3, last=5)["a"]["curves"][0]["y"] == [3, 4, 5]
    assert charts(live, first=9)["a"]["curves"][0]["y"] == [9, 10]
    assert charts(live, last=0)["a"]["curves"][0]["y"] == []


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    live = run(tmp_path, *({"step": step, "a": float(step)} for step in range(1, 101)))
    curve = charts(live, points=10)["a"]["curves"][0]
    assert (len(curve["x"]), curve["size"], curve["low"][0], curve["high"][-1]) == (10, 10, 1, 100)


def test_marks_are_where_their_steps_are(tmp_path: Path) -> None:
    events = ({"step": 2, "kind": "warning", "warning": "lengths", "message": "longer"},
              {"step": 3, "kind": "warning", "warning": "lengths", "state": "passed"}, {"kind": "resume"})  # fmt: skip
    live = run(tmp_path, *LINES, events=events)
    marks = payload(live, axis="tokens")["events"]
    assert [(mark["x"], mark["step"], mark["warning"], mark["passed"]) for mark in marks] == [
        (250, 2, "lengths", False),
        (250, 3, "lengths", True),
    ]
    assert marks[0]["message"] == "longer"


def test_only_the_last_marks_are_drawn(tmp_path: Path) -> None:
    live = run(tmp_path, {"step": 1, "a": 1.0}, events=[{"step": step, "kind": "memory"} for step in range(1_000)])
    assert [mark["step"] for mark in payload(live)["events"]] == list(range(600, 1_000))


def test_patterns_match_whole_names_in_their_order() -> None:
    assert matching({"b": "B", r"a/(\w+)": "{} of a"}, ["a/x", "b", "bb", "a/"]) == [("b", "B"), ("a/x", "x of a")]
    assert matching({r"a/(.+)": "{}"}, ["a/{}", "a/{0.__class__}"]) == [
        ("a/{}", "{}"),
        ("a/{0.__class__}", "{0.__class__}"),
    ]


def test_a_run_without_metrics_has_no_charts(tmp_path: Path) -> None:
    found = payload(run(tmp_path))
    assert (found["charts"], found["events"]) == ([], [])
