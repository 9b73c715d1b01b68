"""`gruppo train` under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from gruppo.training.api import train
from tests.cluster.compare import assert_same_run, lines
from tests.small_runs import ROWS, recipe

pytestmark = pytest.mark.cluster
CONSTANT = {"optimizer__schedule": "constant"}  # such a run can become shorter


def recipe_file(model: str, folder: Path, **changes: Any) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    reward = str(Path("tests/rewards/functions.py").absolute()) + ":likes_letters"
    settings = recipe(model, task__name=str(rows), **{"reward__functions": [reward]} | changes)
    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(settings))
    return file


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gruppo.cli.main"]
    command += ["train", str(file), "--set", "cluster.trainers=2", "--out", str(out), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_under_torchrun_equals_one_process(tiny_folder: str, tmp_path: Path) -> None:
    file = recipe_file(tiny_folder, tmp_path, run__steps=3, model__dtype="float64")
    train(file, out=tmp_path / "one", progress=False)
    process = start(file, tmp_path / "two")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("Done: 3 steps") == 1  # the leader alone speaks
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_rank_that_dies_ends_the_run_which_then_continues(tiny_folder: str, tmp_path: Path) -> None:
    file = recipe_file(tiny_folder, tmp_path, run__steps=400, run__checkpoint_every=1, **CONSTANT)
    out = tmp_path / "run"
    process = start(file, out)
    wait(lambda: (out / "metrics.jsonl").is_file() and len(lines(out)) >= 2)
    os.kill(process_of(process.pid, 1), signal.SIGKILL)
    died = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - died < 60  # torchrun itself waits half a minute
    assert process.returncode != 0
    causes = [line for line in output.splitlines() if line.startswith("gruppo: rank")]
    assert len(causes) == 1, output
    assert causes[0].startswith("gruppo: rank 0: rank 1 has ended, or is silent since "), output
    assert "resume with --resume" in causes[0]
    done = len(lines(out))
    file = recipe_file(tiny_folder, tmp_path, run__steps=done + 2, run__checkpoint_every=1, **CONSTANT)
    process = start(file, out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [line["step"] for line in lines(out)] == list(range(1, done + 3))


def test_a_recipe_is_shown_once() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gruppo.cli.main"]
    command += ["train", "quickstart", "--set", "cluster.trainers=2", "--show"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.count("\n[cluster]\n") == 1


SLOW = """
import time

def slow(completions, **_):
    time.sleep(30)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("stopped", "scoring"), [(1, False), (0, False), (0, True)], ids=["follower", "leader", "idle"]
)
def test_a_rank_that_is_stopped_ends_the_run_with_its_name(
    tiny_folder: str, tmp_path: Path, stopped: int, scoring: bool
) -> None:
    """While the leader scores, the other ranks exchange nothing with it."""
    changes: dict[str, Any] = {"cluster__patience": 15.0, "run__steps": 4000, **CONSTANT}
    if scoring:
        (tmp_path / "slow.py").write_text(SLOW)
        changes |= {"reward__functions": [f"{tmp_path / 'slow.py'}:slow"], "reward__timeout": 300.0}
    process = start(recipe_file(tiny_folder, tmp_path, **changes), tmp_path / "run")
    status, metrics = (tmp_path / "run" / name for name in ("status.json", "metrics.jsonl"))
    if scoring:
        wait(lambda: status.is_file() and json.loads(status.read_text())["phase"] == "Scoring")
    else:
        wait(lambda: metrics.is_file() and len(lines(tmp_path / "run")) >= 1)
    os.kill(process_of(process.pid, stopped), signal.SIGSTOP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    causes = [line for line in output.splitlines() if line.startswith("gruppo: rank")]
    assert len(causes) == 1, output
    assert causes[0].startswith(f"gruppo: rank {1 - stopped}: rank {stopped} has ended, or is silent since "), output


def test_ctrl_c_saves_the_run(tiny_folder: str, tmp_path: Path) -> None:
    file = recipe_file(tiny_folder, tmp_path, run__steps=400, run__checkpoint_every=100)
    out = tmp_path / "run"
    process = start(file, out)
    wait(lambda: (out / "metrics.jsonl").is_file() and len(lines(out)) >= 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    done = len(lines(out))
    assert f"Interrupted after step {done} of 400; everything is saved" in output, output
    assert (out / f"checkpoints/step-{done:06d}/manifest.json").is_file()


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def process_of(launcher: int, rank: int) -> int:
    """The process of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0".encode() in path.joinpath("environ").read_bytes():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"there is no rank {rank}")
