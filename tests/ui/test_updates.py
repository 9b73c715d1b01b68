"""A page that follows a run fetches the new points of its curves, and has then what a fetch of everything gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from gruppo.runs.missing import missing_parts
from gruppo.ui.charts import payload
from gruppo.ui.live import LiveRun, rounded


def write_lines(run: Path, steps: range, every: int = 5) -> None:
    """Append the metrics of steps, with an evaluation after every fifth."""
    with (run / "metrics.jsonl").open("a") as stream:
        for step in steps:
            values = {"completion/length": 9.0 + step % 3, "completion/length_min": 1, "completion/length_max": step,
                      "reward/mean": step / 7, "time/step": 2.0, "mine": step % 2}  # fmt: skip
            stream.write(json.dumps({"step": step, **values}) + "\n")
            if step % every == 0:
                accuracy = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": step / 100}
                stream.write(json.dumps({"step": step, **accuracy}) + "\n")


def joined(old: dict[str, Any] | None, fresh: dict[str, Any]) -> dict[str, Any]:
    """What charts.js makes of a curve that begins at `start`."""
    if not (start := fresh.get("start")):
        return fresh
    assert old is not None
    assert (old["size"], len(old["x"]) >= start) == (fresh["size"], True)
    whole = {name: value for name, value in fresh.items() if name != "start"}
    for part in ("x", "y", "low", "high"):
        if part in fresh:
            whole[part] = old[part][:start] + fresh[part]
    if "band" in fresh:
        whole["band"] = [joined(*ends) for ends in zip(old["band"], fresh["band"], strict=True)]
    return whole


def curves_of(charts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{chart['id']} {curve['name']}": curve for chart in charts["charts"] for curve in chart["curves"]}


@pytest.mark.parametrize("points", [800, 10])
@pytest.mark.parametrize("axis", ["step", "time"])
@pytest.mark.parametrize("more", [0, 1, 4, 5, 9])
def test_new_points_complete_the_curves(tmp_path: Path, points: int, axis: str, more: int) -> None:
    write_lines(tmp_path, range(1, 41))
    live = LiveRun(tmp_path)
    before = payload(live, axis, points=points)
    write_lines(tmp_path, range(41, 41 + more))
    fresh, every = (
        curves_of(payload(live, axis, points=points, since=before["step"])),
        payload(live, axis, points=points),
    )
    sizes = {name: curve["size"] for name, curve in curves_of(before).items()}
    kept = {name: curve for name, curve in fresh.items() if curve["size"] == sizes[name]}
    assert {name: joined(curves_of(before)[name], curve) for name, curve in kept.items()} == {
        name: curve for name, curve in curves_of(every).items() if name in kept
    }
    if points == 800:
        assert kept.keys() == fresh.keys()
        assert {len(curve["x"]) for name, curve in fresh.items() if "reward" in name} == {1 + more}
    assert fresh.keys() == curves_of(every).keys()


def test_a_second_line_of_the_last_step(tmp_path: Path) -> None:
    """The page may have seen the metrics of a step before those of its evaluation were written."""
    write_lines(tmp_path, range(1, 11))
    live = LiveRun(tmp_path)
    write_lines(tmp_path, range(11, 16), every=99)
    before = payload(live)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 15, "eval/accuracy": 0.7}) + "\n")
    fresh = curves_of(payload(live, since=before["step"]))["accuracy eval/accuracy"]
    assert joined(curves_of(before)["accuracy eval/accuracy"], fresh)["x"] == [5, 10, 15]


def test_steps_that_are_not_in_order_are_sent_again(tmp_path: Path) -> None:
    for steps in (range(5, 9), range(1, 4)):
        write_lines(tmp_path, steps)
    live = LiveRun(tmp_path)
    assert curves_of(payload(live, since=payload(live)["step"]))["reward reward/mean"]["start"] == 0


def test_the_last_step_is_void_when_the_file_is_cut_back(tmp_path: Path) -> None:
    write_lines(tmp_path, range(1, 9))
    live = LiveRun(tmp_path)
    before = payload(live)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:4]))
    after = payload(live)
    assert (before["step"], after["step"]) == (8, 4)
    assert before["generation"] != after["generation"]


def test_missing_parts_by_metrics_that_are_read_already(tmp_path: Path) -> None:
    """The dashboard has the metrics in memory; the descriptions are the same as from the file."""
    write_lines(tmp_path, [*range(1, 5), *range(6, 9), 8])  # type: ignore[arg-type]
    (tmp_path / "rollouts").mkdir()
    live = LiveRun(tmp_path)
    live.poll()
    lines = live.lines_with(lambda name: name == "completion/length" or name.startswith("eval/"))
    found = missing_parts(tmp_path, lines)
    assert found == missing_parts(tmp_path)
    assert any("several lines of step 8" in problem for problem in found)


def test_rounded_values() -> None:
    values = [0.0, 1 / 3, -200 / 3, 3_456_789_012.5, 1.7e308, 5e-324, math.nan, -math.inf, 9.99999999, 1e-16, 123456.78]
    expected = [0.0, 0.3333333, -66.66667, 3_456_789_000.0, 1.7e308, 5e-324, math.nan, -math.inf, 10.0, 1e-16, 123456.8]
    assert [repr(value) for value in rounded(np.array(values)).tolist()] == [repr(value) for value in expected]


def test_a_page_of_another_generation_gets_everything(tmp_path: Path, connect: Callable[..., TestClient]) -> None:
    """The run was resumed, or the server started again: what the page has may not be what the run has."""
    write_lines(tmp_path, range(1, 9))
    (tmp_path / "recipe.toml").write_text("")
    client = connect(tmp_path)
    address = f"/api/r/{client.get('/api/runs').json()[0]['key']}/series"
    known = client.get(address).json()
    for generation, starts in ((known["generation"], {7}), (known["generation"] + 1, {None}), ("", {None})):
        query = {"since": known["step"], "generation": generation} if generation != "" else {"since": known["step"]}
        found = curves_of(client.get(address, params=query).json())
        assert {curve.get("start") for name, curve in found.items() if "reward" in name} == starts
