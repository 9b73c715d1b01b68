"""Signals, as a user sends them to the command line: the first ends a run soon and says how to go on, the second at
once. And the lock of a run folder, which nothing keeps but a process that is alive."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from gruppo.errors import UsageError
from gruppo.runs.folder import RunFolder
from gruppo.training.api import train
from gruppo.utils.signals import Interrupted, Stop, stop_on_signals
from tests.cli.test_cli import ENVIRONMENT
from tests.small_runs import ROWS, fingerprint, recipe

USERS = "tests/functions_of_users.py"


@pytest.fixture
def written(tiny_folder: str, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: object) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        data = recipe(tiny_folder, **changes)
        data["task"] = {"name": str(tmp_path / "rows.jsonl")}
        (tmp_path / "tiny.toml").write_text(tomli_w.dumps(data))
        return tmp_path / "tiny.toml"

    return write


def begin(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "gruppo.cli.main", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**ENVIRONMENT, "SLOW": "1"},
    )  # fmt: skip


def until(process: subprocess.Popen, found: Callable[[str], bool]) -> None:
    assert process.stdout is not None
    assert any(found(line) for line in process.stdout), "ended before it came there"


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Code and output; all of these runs would go on for half a minute and more."""
    start = time.monotonic()
    said, _ = process.communicate(timeout=25)
    assert time.monotonic() - start < 25
    assert "Traceback" not in said
    return process.returncode, said


def test_the_first_signal_while_a_reward_takes_its_time_and_the_command_that_is_shown(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "a run"
    file = written(reward__functions=[f"{USERS}:sleeps"], reward__timeout=60, reward__environment=["SLOW"])
    process = begin("train", file, "--out", out, "--set", "run.steps=2")
    until(process, lambda line: "a run" in line)
    while not (out / "environment.json").is_file():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 130
    told = "gruppo: stopping at the next safe point; once more stops at once"
    assert told in said
    assert "Interrupted after step 0 of 2; everything is saved. Go on with:" in said
    shown = shlex.split(said.splitlines()[-1])
    assert shown == ["gruppo", "train", str(file), "--set", "run.steps=2", "--out", str(out), "--resume"]
    again = subprocess.run([sys.executable, "-m", "gruppo.cli.main", *shown[1:]], capture_output=True, env=ENVIRONMENT)
    assert again.returncode == 0
    train(file, overrides=["run.steps=2"], out=tmp_path / "whole")
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


def test_the_second_signal_ends_a_long_update_at_once(written: Callable[..., Path], tmp_path: Path) -> None:
    file = written(method__surrogate=f"{USERS}:slow_surrogate", sampling__max_tokens=16)
    process = begin("train", file, "--out", tmp_path / "run")
    until(process, lambda line: line == "updating\n")
    process.send_signal(signal.SIGINT)
    until(process, lambda line: "once more stops at once" in line)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (-signal.SIGTERM, ""), "a shell shows 143"


@pytest.mark.parametrize("moment", [0.5, 2.0])
def test_while_it_loads(moment: float, written: Callable[..., Path], tmp_path: Path) -> None:
    """torch is imported then, or the model read."""
    process = begin(
        "train", written(reward__functions=[f"{USERS}:sleeps"], reward__environment=["SLOW"]), "--out", tmp_path / "run"
    )
    until(process, lambda line: line.startswith("gruppo 0."))
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130
    assert "--resume" in said.splitlines()[-1]


def test_labelling_and_long_evaluations_end_soon_too(written: Callable[..., Path], tmp_path: Path) -> None:
    slow = {"reward__functions": [f"{USERS}:sleeps"], "reward__timeout": 60, "reward__environment": ["SLOW"]}
    file = written(**slow, reward_model__prompts=4, reward_model__kind="outcome")
    process = begin("label", file, "--out", tmp_path / "labels")
    while not (tmp_path / "labels/environment.json").is_file():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130
    assert said.splitlines()[-1] == f"  gruppo label {file} --out {tmp_path}/labels --resume"


def test_anywhere_means_at_once_and_everywhere_else_at_the_next_check() -> None:
    with stop_on_signals() as stop, stop_on_signals() as inner:
        assert inner is stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted), stop_on_signals():
        _library_that_catches_exceptions()
    later = Stop()
    later.request()
    with pytest.raises(Interrupted), later.interruptible():
        pytest.fail("a stop that was asked for before is heeded where it may be")


def _library_that_catches_exceptions() -> None:
    with stop_on_signals() as stop, stop.interruptible(), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGINT)
    pytest.fail("went on")


def test_a_lock_is_given_up_by_a_process_that_dies_whatever_lives_on_of_it(tmp_path: Path) -> None:
    """Killed, with a process that it had forked still there and holding all of its descriptors."""
    code = f"""
import os, time
from pathlib import Path
from gruppo.runs.folder import RunFolder
run = RunFolder(Path({str(tmp_path / "run")!r}))
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    with pytest.raises(
        UsageError, match=rf"another run is writing to this folder \(process {process.pid} on .*\); wait"
    ):
        RunFolder(tmp_path / "run")
    process.kill()
    process.wait()
    os.kill(child, 0)
    RunFolder(tmp_path / "run").close()
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(UsageError, match=r"its file system keeps no locks \(.*\).*choose a folder on another"):
        RunFolder(tmp_path / "run")
