"""The list of runs: where they are found, and what a line says of each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gruppo.ui import catalog
from gruppo.ui.app import STATES, Sorting, _counts, _matches, _sorted
from gruppo.ui.catalog import Card, Catalog, run_key
from tests.ui.made import RECIPE, make_run

NOW = 1_800_000_000.0


def moment(seconds_ago: float) -> str:
    return datetime.fromtimestamp(NOW - seconds_ago, UTC).isoformat(timespec="milliseconds")


def steps(count: int, **values: float | None) -> list[Mapping[str, Any]]:
    return [{"step": step, "completion/length": 5.0, "time/step": 2.0, **values} for step in range(1, count + 1)]


def card(root: Path, name: str = "run") -> Card:
    """The line of a run in a folder that was never looked at, as JSON and in the order of the list too."""
    found = Catalog(root)
    for each in found.cards(NOW):
        json.dumps(each.values(), allow_nan=False)
    key = run_key(name)
    path = found.path(key)
    assert path is not None
    return found.card(key, path, NOW)


def running(**changes: Any) -> dict[str, Any]:
    return {"state": "running", "phase": "Sampling", "done": 3.0, "total": 8.0, "unit": "groups", "step": 4,
            "steps": 10, "heartbeat": moment(5), **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "summary", "state", "words"),
    [
        (running(), None, "running", "running, 4 of 10 steps done; Sampling 3 of 8 groups"),
        (running(heartbeat=moment(59)), None, "running", "running, 4 of 10"),
        (running(heartbeat=moment(61)), None, "silent", "no sign of life since 2027"),
        (running(heartbeat="yesterday"), None, "silent", "no sign of life"),
        (running(state="done", step=10), {"state": "done"}, "done", "done after step 10 of 10"),
        (running(state="interrupted"), None, "interrupted", "interrupted after step 4 of 10"),
        (running(state="failed"), None, "failed", "failed after step 4 of 10"),
        (running(state="stopped"), {"state": "stopped"}, "stopped", "stopped after step 4 of 10"),
        (None, {"state": "done"}, "done", "done"),
        (None, {}, "unknown", "unknown"),
        (None, None, "unfinished", "unfinished"),
    ],
)
def test_states(tmp_path: Path, status: Any, summary: Any, state: str, words: str) -> None:
    files = {name: content for name, content in (("status", status), ("summary", summary)) if content is not None}
    make_run(tmp_path / "run", metrics=steps(4), **files)
    found = card(tmp_path)
    assert found.state.name == state
    assert words in found.state.words


def test_a_run_falls_silent_without_a_change_of_its_files(tmp_path: Path) -> None:
    make_run(tmp_path / "run", status=running())
    found = Catalog(tmp_path)
    (key,) = found.paths()
    path = tmp_path / "run"
    assert [found.card(key, path, NOW + later).state.name for later in (0, 100)] == ["running", "silent"]


def test_a_line_of_the_list(tmp_path: Path) -> None:
    evaluated = {"eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3}
    metrics = [{"step": 0, **evaluated}, *steps(4, **{"reward/mean": 0.75}),
               {"step": 4, **evaluated, "eval/accuracy": 0.5}]  # fmt: skip
    make_run(tmp_path / "a/b/run", RECIPE + '[method]\nname = "dapo"\n', metrics, status=running())
    found = card(tmp_path, "a/b/run")
    assert (found.name, found.folder, found.model, found.task) == ("made", "a/b/run", "some/model", "arithmetic")
    assert (found.method, found.step, found.steps, found.share) == ("dapo", 4, 10, 0.4)
    assert (found.reward, found.accuracy, found.low, found.high, found.before) == (0.75, 0.5, 0.2, 0.3, 0.25)
    assert found.problem == ""


def test_time_left_follows_from_recent_steps(tmp_path: Path) -> None:
    metrics = [*steps(5, **{"time/step": 100.0}), *steps(10)]
    make_run(tmp_path / "run", metrics=metrics, status=running())
    assert card(tmp_path).left == 2.0 * 6
    make_run(tmp_path / "run", metrics=metrics, status=running(heartbeat=moment(100)))
    assert card(tmp_path).left is None
    make_run(tmp_path / "run", metrics=steps(4, **{"time/step": None}), status=running())
    assert card(tmp_path).left is None


def test_one_evaluation_is_not_compared_with_itself(tmp_path: Path) -> None:
    make_run(tmp_path / "run", metrics=[{"step": 0, "eval/accuracy": 0.25}, *steps(2)])
    found = card(tmp_path)
    assert (found.accuracy, found.before, found.low) == (0.25, None, None)


def test_the_last_warning_that_has_not_passed(tmp_path: Path) -> None:
    events = [
        {"kind": "warning", "warning": "lengths", "step": 3, "message": "longer", "state": "began"},
        {"kind": "warning", "warning": "kl_explodes", "step": 4, "message": "KL", "state": "began"},
        {"kind": "memory", "step": 5, "message": "halved"},
        {"kind": "warning", "warning": "kl_explodes", "step": 9, "message": "not seen", "state": "passed"},
    ]
    make_run(tmp_path / "run", events=events)
    assert card(tmp_path).warning == "step 3: longer"
    make_run(tmp_path / "run", events=events[1:])
    assert card(tmp_path).warning == ""


def test_values_of_a_long_file_come_from_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "TAIL", 2_000)
    monkeypatch.setattr(catalog, "HEAD", 1_000)
    metrics = [{"step": 0, "eval/accuracy": 0.1}, *steps(500), {"step": 500, "eval/accuracy": 0.9}]
    make_run(tmp_path / "run", metrics=metrics)
    found = card(tmp_path)
    assert (found.step, found.accuracy, found.before) == (500, 0.9, 0.1)


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=steps(2))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "completion/length": 5.0}')
    assert card(tmp_path).step == 2


# ---------------------------------------------------------------- where runs are


def test_runs_are_found_in_and_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e", ".hidden/f", "a/inside"):
        make_run(tmp_path / name)
    make_run(tmp_path / "labels", folder={"kind": "labels"})
    make_run(tmp_path / "x/1/2/3/4/5/deep")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/recipe.toml").symlink_to(tmp_path / "a/recipe.toml")
    paths = {path.relative_to(tmp_path).as_posix() for path in Catalog(tmp_path).paths().values()}
    assert paths == {"a", "b/c", "b/d/e"}


def test_a_folder_can_be_a_run_itself(tmp_path: Path) -> None:
    make_run(tmp_path)
    (found,) = Catalog(tmp_path).cards()
    assert found.folder == tmp_path.name


def test_a_run_that_has_just_begun_is_found_by_its_key(tmp_path: Path) -> None:
    found = Catalog(tmp_path)
    assert found.paths() == {}
    make_run(tmp_path / "new")
    assert found.path(run_key("new")) == tmp_path / "new"
    assert found.path("../new") is None


@pytest.mark.parametrize("name", ["run", "../../etc", "a b/ü", "<script>", "", "-", "x" * 300, "a\udcff"])
def test_keys_are_names_and_never_paths(name: str) -> None:
    key = run_key(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,39}-[0-9a-f]{8}", key)
    assert run_key(name) == key
    assert run_key(f"{name}x") != key


def test_running_runs_come_first_then_the_most_recent(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new", "live")):
        run = make_run(tmp_path / name, **({"status": running()} if name == "live" else {}))
        os.utime(run / "recipe.toml", (1_000_000 - 100_000 * (number == 2) + 3_600 * number,) * 2)
    assert [found.folder for found in Catalog(tmp_path).cards(NOW)] == ["live", "new", "old"]


# ---------------------------------------------------------------- folders of strangers


@pytest.mark.parametrize(
    "recipe",
    ["[run", 'run = "x"', "run = []\nmodel = 5\nmethod = 1\ntask = 2\nmixture = {}", "mixture = [1, 2]", "",
     "[run]\nname = 5\nsteps = -3", "[run]\nsteps = 1e99", "a = " + "[" * 3_000, "a = \x00",
     '[reward]\noptions = 5\nfunctions = "x"', "evaluation = 1\nbenchmarks = [1]"],
)  # fmt: skip
def test_recipes_of_strangers(tmp_path: Path, recipe: str) -> None:
    make_run(tmp_path / "run", recipe, steps(2))
    found = card(tmp_path)
    assert found.name
    assert found.step == 2


def test_a_recipe_that_is_no_text_or_too_large_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.toml").write_bytes(b"\xff\xfe")
    assert card(tmp_path).problem.startswith("recipe.toml: ")
    monkeypatch.setattr(catalog, "MOST_RECIPE", 1)
    assert "too large" in card(tmp_path).problem


@pytest.mark.parametrize(
    "changes",
    [
        {"heartbeat": 5}, {"heartbeat": None}, {"total": "x"}, {"done": []}, {"done": None, "total": 5},
        {"steps": "ten"}, {"step": -1}, {"step": 2**70}, {"steps": 2**70}, {"state": []}, {"state": 7},
        {"phase": {}, "unit": 3}, {"done": math.nan, "total": math.inf}, {"unit": None}, {"attempt": "1"},
        {"step": True}, {"steps": 10.5},
        {"heartbeat": "9999-12-31T23:59:59-23:59"}, {"heartbeat": "0001-01-01T00:00:00+23:59"},
    ],
)  # fmt: skip
def test_statuses_of_strangers(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_run(tmp_path / "run", metrics=steps(2), status=running(**changes))
    found = card(tmp_path)
    assert isinstance(found.state.name, str)
    assert found.step >= 0


@pytest.mark.parametrize(
    "line",
    [
        {"time/step": 1e308}, {"time/step": -5.0}, {"time/step": "x"}, {"reward/mean": True}, {"reward/mean": 10**400},
        {"eval/accuracy": True}, {"eval/accuracy": math.nan}, {"eval/accuracy": 0.5, "eval/accuracy_low": []},
        {"step": "x"}, {"step": -1}, {"step": 1e300}, {"step": None},
    ],
)  # fmt: skip
def test_metrics_of_strangers(tmp_path: Path, line: dict[str, Any]) -> None:
    lines = [{"step": 1, "completion/length": 5.0, **line}] * 5
    make_run(tmp_path / "run", metrics=lines, status=running(steps=2**52))
    found = card(tmp_path)
    for value in (found.left, found.pace, found.reward, found.accuracy, found.low):
        assert value is None or (math.isfinite(value) and type(value) is not bool)
    assert found.left is None or found.left >= 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "status.json", "summary.json", "environment.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "bytes"])
def test_files_that_are_none(tmp_path: Path, name: str, kind: str) -> None:
    run = make_run(tmp_path / "run")
    outside = make_run(
        tmp_path / "out", RECIPE, steps(7), status=running(step=7), summary={"state": "done", "steps": 7}
    )
    (run / name).unlink(missing_ok=True)
    if kind == "link":
        (run / name).symlink_to(outside / name)
    elif kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).write_bytes(b"\xff\x00[" * 99)
    found = card(tmp_path)
    assert (found.step, found.warning) == (0, "")


# ---------------------------------------------------------------- sorting and filtering


def cards(tmp_path: Path) -> list[Card]:
    for name, reward, accuracy in (("b", 0.5, None), ("a", None, 0.2), ("C", -1.0, 0.9)):
        recipe = RECIPE.replace('"made"', f'"{name}"')
        make_run(
            tmp_path / name, recipe, [*steps(1, **{"reward/mean": reward}), {"step": 1, "eval/accuracy": accuracy}]
        )
    make_run(tmp_path / "d", RECIPE.replace('"made"', '"d"'), status=running())
    return Catalog(tmp_path).cards(NOW)


@pytest.mark.parametrize(
    ("sort", "descending", "names"),
    [
        ("name", False, "abCd"),
        ("name", True, "dCba"),
        ("reward", True, "bC"),
        ("reward", False, "Cb"),
        ("accuracy", True, "Ca"),
        ("state", False, "d"),
    ],
)
def test_sorting_puts_what_is_not_known_last(tmp_path: Path, sort: str, descending: bool, names: str) -> None:
    found = _sorted(cards(tmp_path), Sorting("", "", sort, descending, lambda **_: None))
    assert [each.name for each in found][: len(names)] == list(names)
    assert len(found) == 4


def test_filters(tmp_path: Path) -> None:
    found = cards(tmp_path)
    for query, state, names in (
        ("SOME arith", "", "abCd"),
        ("B", "", "b"),
        ("nothing", "", ""),
        ("", "running", "d"),
        ("", "unfinished", "abC"),
    ):
        sorting = Sorting(query, state, "", True, lambda **_: None)
        assert sorted(each.name for each in found if _matches(each, sorting)) == sorted(names), (query, state)


def test_counts_of_states_in_words(tmp_path: Path) -> None:
    found = cards(tmp_path)
    assert _counts(found, found) == "4 runs: 1 running, 3 unfinished"
    assert _counts(found, found[:1]) == "1 of 4 runs: 1 running"
    assert _counts(found[:1], found[:1]) == "1 run: 1 running"
    assert {each.state.name for each in found} <= set(STATES)
