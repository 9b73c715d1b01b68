"""Files that grow while they are read: lines, metrics and events of a run that is followed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gruppo.runs import tail as tail_module
from gruppo.runs.tail import Tail
from gruppo.ui import live
from gruppo.ui.live import LiveRun, thin
from gruppo.ui.runs import OpenRuns
from tests.ui.made import make_run


def append(path: Path, *lines: Any) -> None:
    """Add lines, whatever the clock's resolution is: the size of the file changes."""
    with path.open("ab") as stream:
        stream.writelines((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def values(found: tuple[bool, list[dict[str, Any]]]) -> tuple[bool, list[Any]]:
    return found[0], [line.get("n") for line in found[1]]


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    assert values(tail.read()) == (False, [])
    append(tail.path, {"n": 1}, {"n": 2})
    assert values(tail.read()) == (False, [1, 2])
    assert values(tail.read()) == (False, [])
    append(tail.path, {"n": 3})
    assert values(tail.read()) == (False, [3])


def test_half_a_line_waits_for_the_rest(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    tail.path.write_bytes(b'{"n": 1}\n{"n"')
    assert values(tail.read()) == (False, [1])
    with tail.path.open("ab") as stream:
        stream.write(b": 2}")
    assert values(tail.read()) == (False, [])
    with tail.path.open("ab") as stream:
        stream.write(b"\n")
    assert values(tail.read()) == (False, [2])
    assert tail.damaged == 0


def test_a_file_that_was_cut_back_is_read_again(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    append(tail.path, {"n": 1}, {"n": 2}, {"n": 3})
    tail.read()
    with tail.path.open("r+b") as stream:
        stream.truncate(len(b'{"n": 1}\n'))
    assert values(tail.read()) == (True, [1])
    append(tail.path, {"n": 20})
    assert values(tail.read()) == (False, [20])


def test_a_file_that_was_cut_back_and_grew_beyond_is_read_again(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    append(tail.path, {"n": 1}, {"n": 2})
    tail.read()
    inode = tail.path.stat().st_ino
    with tail.path.open("r+b") as stream:
        stream.truncate(len(b'{"n": 1}\n'))
    append(tail.path, {"n": 30}, {"n": 40}, {"n": 50})
    assert tail.path.stat().st_ino == inode
    assert values(tail.read()) == (True, [1, 30, 40, 50])


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    append(tail.path, {"n": 1}, {"n": 2})
    tail.read()
    append(tmp_path / "other", {"n": 5}, {"n": 6}, {"n": 7})
    os.replace(tmp_path / "other", tail.path)
    assert values(tail.read()) == (True, [5, 6, 7])


def test_a_file_that_was_deleted_is_void_once(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    append(tail.path, {"n": 1})
    tail.read()
    tail.path.unlink()
    assert tail.read() == (True, [])
    assert tail.read() == (False, [])
    append(tail.path, {"n": 2})
    assert values(tail.read()) == (False, [2])


def test_damaged_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    append(tail.path, b"{", b"[1]", b"5", b"", b"  ", b"\xff\xfe", b"[" * 100_000, {"n": 1})
    assert values(tail.read()) == (False, [1])
    assert tail.damaged == 5
    append(tail.path, b"null")
    tail.read()
    assert tail.damaged == 6
    tail.path.write_bytes(b"")
    assert tail.read() == (True, [])
    assert tail.damaged == 0


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_lines_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(tail_module, "CHUNK", chunk)
    tail = Tail(tmp_path / "file")
    append(tail.path, *({"n": number, "text": "é" * number} for number in range(20)))
    assert values(tail.read()) == (False, list(range(20)))


@pytest.mark.parametrize("chunk", [10, 10_000])
def test_a_line_without_end_is_skipped_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(tail_module, "CHUNK", chunk)
    monkeypatch.setattr(tail_module, "LONGEST_LINE", 100)
    tail = Tail(tmp_path / "file")
    append(tail.path, {"n": 1}, {"n": "x" * 500}, {"n": 2})
    assert values(tail.read()) == (False, [1, 2])
    assert tail.damaged == 1
    with tail.path.open("ab") as stream:
        stream.write(b'"' + b"y" * 500)
    assert values(tail.read()) == (False, [])
    append(tail.path, b"zz", {"n": 3})
    assert values(tail.read()) == (False, [3])


@pytest.mark.parametrize("kind", ["a link", "a folder", "a pipe"])
def test_only_files_are_followed(tmp_path: Path, kind: str) -> None:
    append(tmp_path / "outside", {"n": 1})
    tail = Tail(tmp_path / "file")
    if kind == "a link":
        tail.path.symlink_to(tmp_path / "outside")
    elif kind == "a folder":
        tail.path.mkdir()
    else:
        os.mkfifo(tail.path)
    assert tail.read() == (False, [])


# ---------------------------------------------------------------- runs


def followed(run: Path, *metrics: Any, events: tuple[Any, ...] = ()) -> LiveRun:
    make_run(run, metrics=metrics, events=events)
    found = LiveRun(run)
    found.poll()
    return found


def test_metrics_of_a_run_grow(tmp_path: Path) -> None:
    run = followed(tmp_path, {"step": 0, "eval/accuracy": 0.5}, {"step": 1, "a": 1.0})
    before = run.revision
    assert run.poll() == before
    append(tmp_path / "metrics.jsonl", {"step": 2, "a": 2, "b": None})
    assert run.poll() != before
    assert run.names() == ["a", "b", "eval/accuracy"]
    assert (run.last("a"), run.last("b"), run.last("c")) == (2, None, None)
    assert (run.at("a", 1), run.at("a", 3), run.at("c", 1)) == (1, None, None)
    steps, found = run.arrays(["a", "c"])["a"]
    assert (steps.tolist(), found.tolist()) == ([1, 2], [1, 2])


def test_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    run = followed(tmp_path, *({"step": step, "a": float(step)} for step in (1, 2, 3)))
    text = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("r+b") as stream:
        stream.truncate(text.index(b'{"step": 2'))
    append(tmp_path / "metrics.jsonl", {"step": 2, "a": 20.0})
    before = (run.generation, run.revision)
    run.poll()
    assert run.generation == before[0] + 1
    assert run.revision != before[1]
    assert run.arrays(["a"])["a"][1].tolist() == [1, 20]


def test_numbers_that_are_not_finite_are_not_recorded(tmp_path: Path) -> None:
    lines = [b'{"step": 1, "a": NaN}', b'{"step": 2, "a": Infinity}', b'{"step": 3, "a": 1e999}',
             b'{"step": 4, "a": 1' + b"0" * 400 + b"}", b'{"step": 5, "a": 7}']  # fmt: skip
    run = followed(tmp_path)
    append(tmp_path / "metrics.jsonl", *lines)
    run.poll()
    found = run.arrays(["a"])["a"][1]
    assert np.isnan(found[:4]).all()
    assert found[4] == 7


@pytest.mark.parametrize("step", [None, "1", 1.0, True, [], 2**53 + 1, -(2**70)])
def test_a_line_without_a_step_is_damaged(tmp_path: Path, step: Any) -> None:
    run = followed(
        tmp_path, {"step": step, "a": 1.0}, {"a": 2.0}, {"step": 1, "a": 3.0, "b": "text", "c": True, "d": {}}
    )
    assert run.damaged == 2
    assert run.names() == ["a"]
    assert run.last("a") == 3


def test_metrics_without_end_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_NAMES", 3)
    run = followed(tmp_path, {"step": 1, **{f"m{number}": 1 for number in range(9)}})
    assert len(run.names()) == 3


def test_events_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_EVENTS", 3)
    run = followed(tmp_path, events=({"step": 1, "kind": "memory", "message": "halved", "time": "now"},))
    assert run.events == [
        {"step": 1, "time": "now", "kind": "memory", "message": "halved", "warning": "", "passed": False}
    ]
    append(tmp_path / "events.jsonl", *({"step": step, "kind": "warning", "warning": "lengths"} for step in (2, 3, 4)))
    append(tmp_path / "events.jsonl", {"step": 5, "kind": "warning", "warning": "lengths", "state": "passed"})
    run.poll()
    assert [event["step"] for event in run.events] == [3, 4, 5]
    assert [event["passed"] for event in run.events] == [False, False, True]


@pytest.mark.parametrize(
    "event",
    [
        {"kind": [], "warning": {}, "step": "x", "message": None, "time": 5},
        {"kind": "warning", "warning": []},
        {"kind": {"a": 1}, "step": 2**60},
        {"kind": json.loads("[" * 700 + "]" * 700)},
        {"message": "x" * 10_000, "kind": "y" * 10_000, "warning": "z" * 10_000},
        {},
    ],
)
def test_events_of_strangers(tmp_path: Path, event: dict[str, Any]) -> None:
    (found,) = followed(tmp_path, events=(event,)).events
    assert found["step"] is None
    assert all(len(found[name]) <= most for name, most in (("kind", 80), ("message", 2_000), ("warning", 80)))
    assert found["kind"] != "None"
    json.dumps(found, allow_nan=False)


def test_older_names_are_translated(tmp_path: Path) -> None:
    run = followed(tmp_path, {"step": 1, "groups/with_signal": 0.5}, events=({"step": 1, "kind": "no_signal"},))
    assert run.names() == ["groups/nonzero_advantage"]
    assert run.events[0]["kind"] == "no_nonzero_advantage"


def test_a_folder_without_files_has_nothing(tmp_path: Path) -> None:
    run = LiveRun(tmp_path)
    run.poll()
    assert (run.names(), run.events, run.damaged) == ([], [], 0)


def test_open_runs_are_kept_up_to_a_number(tmp_path: Path) -> None:
    runs = OpenRuns(most=2)
    folders = [make_run(tmp_path / name) for name in "abc"]
    first = runs.live(folders[0])
    runs.live(folders[1])
    assert runs.live(folders[0]) is first
    runs.live(folders[2])
    assert runs.live(folders[0]) is first
    assert runs.live(folders[1]) is not first


# ---------------------------------------------------------------- curves


def thinned(values: list[float], points: int) -> dict[str, Any]:
    return thin(np.arange(1, len(values) + 1), np.array(values, dtype=np.float64), points)


def test_a_short_curve_is_whole() -> None:
    assert thinned([1.0, math.nan, 3.0], 3) == {"x": [1, 2, 3], "y": [1, None, 3], "size": 1}
    assert thinned([], 3) == {"x": [], "y": [], "size": 1}


def test_a_long_curve_is_means_with_their_extremes() -> None:
    found = thinned([1.0, 3.0, -5.0, 5.0, 10.0], 3)
    assert found == {"x": [2, 4, 5], "y": [2, 0, 10], "low": [1, -5, 10], "high": [3, 5, 10], "size": 2}


def test_extremes_survive_however_few_points_there_are() -> None:
    values = [0.0] * 10_000
    values[1_234], values[8_765] = 99.0, -77.0
    for points in (1, 3, 100, 9_999):
        found = thinned(values, points)
        assert len(found["y"]) <= points
        assert (max(found["high"]), min(found["low"])) == (99, -77)
        assert found["x"][-1] == 10_000


def test_missing_values_do_not_count_in_means() -> None:
    found = thinned([1.0, math.nan, math.nan, math.nan, 5.0], 3)
    assert (found["y"], found["low"], found["high"]) == ([1, None, 5], [1, None, 5], [1, None, 5])


def test_values_that_overflow_are_missing() -> None:
    found = thinned([1.7e308] * 4, 2)
    assert found["y"] == [None, None]
    assert found["high"] == [1.7e308] * 2
