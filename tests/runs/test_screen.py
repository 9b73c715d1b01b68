"""`gruppo show`: the state of a run in words, and its metrics as curves of characters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.runs.screen import SILENT_SECONDS, show, sparkline, state_of
from gruppo.runs.status import Status
from tests.fuzzing import command
from tests.small_runs import small_run

BEAT = "2026-01-02T03:04:05.000+00:00"
NOW = 1767323045.0  # the same moment


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, 0], "█▁"),
        ([2, 2, 2], "▄▄▄"),
        ([0, None, math.nan, math.inf, 7], "▁   █"),
        ([None, None], "  "),
        ([], ""),
        ([1e308, -1e308], "█▁"),
    ],
)
def test_a_curve_of_characters(values: list[Any], line: str) -> None:
    assert sparkline(values) == line


def test_a_long_curve_shows_means() -> None:
    assert sparkline([0, 0, 8, 8, 4, 4], 3) == "▁█▅"
    assert len(sparkline(range(1001))) <= 40


@pytest.mark.parametrize(
    ("status", "seconds", "name", "words"),
    [
        (Status(phase="Sampling", done=3, total=8, unit="prompts", step=2, steps=6, heartbeat=BEAT), 5, "running",
         "running, 2 of 6 steps done; Sampling 3 of 8 prompts"),
        (Status(step=2, steps=6, heartbeat=BEAT), SILENT_SECONDS + 5, "silent",
         f"no sign of life since {BEAT} (65 s ago), at step 2 of 6"),
        (Status(step=2, heartbeat=BEAT), 4 * 86400, "silent", f"no sign of life since {BEAT} (4 d 0 h ago), at step 2"),
        (Status(heartbeat="?"), 0, "silent", "no sign of life since ? (an unknown time ago), at step 0"),
        (Status("interrupted", step=2, steps=6), 0, "interrupted", "interrupted after step 2 of 6"),
        (None, 0, "done", "done"),
    ],
)  # fmt: skip
def test_the_state_in_words(status: Status | None, seconds: float, name: str, words: str) -> None:
    state = state_of(status, {"state": "done"}, NOW + seconds)
    assert (state.name, state.words) == (name, words)


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"task__held_out": 0.3, "evaluation__questions": 2, "evaluation__grader": "exact_match"}
    return small_run(tiny_folder, tmp_path_factory.mktemp("show") / "run", **changes).path


def test_a_finished_run(finished: Path) -> None:
    code, out, err = command("show", str(finished))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("tiny: grpo of ")
    assert lines[1] == "done after step 6 of 6"
    assert lines[2].startswith("held-out accuracy ")
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in steps if "reward/mean" in line]
    (row,) = [line for line in lines if line.startswith("reward")]
    assert row.split() == ["reward", f"{rewards[0]:.3f}", f"{rewards[-1]:.3f}", sparkline(rewards)]
    assert any("gruppo export" in line for line in lines)
    table = lines[4 : lines.index("", 4)]
    assert max(map(len, table)) <= 80


def test_a_run_that_goes_on_and_one_that_died(tiny_folder: str, tmp_path: Path) -> None:
    run = small_run(tiny_folder, tmp_path / "run", run__steps=3).path
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running", "steps": 6, "heartbeat": BEAT}))
    page = show(run, NOW + 5)
    assert "running, 3 of 6 steps done" in page
    assert " left" in page.splitlines()[1]
    assert "Next:" not in page
    later = show(run, NOW + 100)
    assert f"no sign of life since {BEAT} (2 min ago), at step 3 of 6" in later
    assert f"--out {run} --resume" in later


def test_events_are_shown_as_plain_text(finished: Path, tmp_path: Path) -> None:
    lines = [{"step": step, "kind": "warning", "message": f"\x1b[31mred {step}"} for step in range(6)]
    with (finished / "events.jsonl").open("a") as stream:
        stream.writelines(
            json.dumps(line) + "\n" for line in [*lines, {"step": 6, "kind": "resume", "message": "again"}]
        )
    _, out, _ = command("show", str(finished))
    assert "Events (the last 4 of 6):" in out
    assert "\x1b" not in out
    assert "again" not in out
    with pytest.raises(UsageError, match="contains no run"):
        show(tmp_path)
