"""Signals sent to the command line, and the lock of a run folder.

The first signal stops a run soon and says how to continue; the second one stops it at once. Only a live process holds
the lock.
"""

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
from gruppo.utils.signals import Interrupted, Stop, stop_held, stop_on_signals
from tests.cli.test_cli import ENVIRONMENT
from tests.fuzzing import command
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


def start_command(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "gruppo.cli.main", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**ENVIRONMENT, "SLOW": "1"},
    )  # fmt: skip


def wait_for_line(process: subprocess.Popen, matches: Callable[[str], bool]) -> None:
    assert process.stdout is not None
    assert any(matches(line) for line in process.stdout), "the process ended before it printed the line"


def exit_of(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output, within 25 seconds; without the signal, these runs would take half a minute or more."""
    start = time.monotonic()
    output, _ = process.communicate(timeout=25)
    assert time.monotonic() - start < 25
    assert "Traceback" not in output
    return process.returncode, output


def test_the_first_signal_during_a_slow_reward_and_the_command_to_continue(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "a run"
    file = written(reward__functions=[f"{USERS}:sleeps"], reward__timeout=60, reward__environment=["SLOW"])
    process = start_command("train", file, "--out", out, "--set", "run.steps=2")
    wait_for_line(process, lambda line: "a run" in line)
    while not (out / "environment.json").is_file():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, output = exit_of(process)
    assert code == 130
    assert "gruppo: stopping at the next safe point; a second signal stops immediately" in output
    assert "Interrupted after step 0 of 2; everything is saved. Resume with:" in output
    shown = shlex.split(output.splitlines()[-1])
    assert shown == ["gruppo", "train", str(file), "--set", "run.steps=2", "--out", str(out), "--resume"]
    code, _, errors = command(*shown[1:])
    assert code == 0, errors
    train(file, overrides=["run.steps=2"], out=tmp_path / "whole")
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


def test_the_second_signal_stops_a_long_update_at_once(written: Callable[..., Path], tmp_path: Path) -> None:
    file = written(method__surrogate=f"{USERS}:slow_surrogate", sampling__max_tokens=16)
    process = start_command("train", file, "--out", tmp_path / "run")
    wait_for_line(process, lambda line: line == "updating\n")
    process.send_signal(signal.SIGINT)
    wait_for_line(process, lambda line: "a second signal stops immediately" in line)
    process.send_signal(signal.SIGTERM)
    assert exit_of(process) == (-signal.SIGTERM, ""), "a shell reports 143"


@pytest.mark.parametrize("moment", [0.5, 2.0])
def test_a_signal_during_loading(moment: float, written: Callable[..., Path], tmp_path: Path) -> None:
    """At these moments torch is imported or the model is loaded."""
    process = start_command(
        "train", written(reward__functions=[f"{USERS}:sleeps"], reward__environment=["SLOW"]), "--out", tmp_path / "run"
    )
    wait_for_line(process, lambda line: line.startswith("gruppo 0."))
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    code, output = exit_of(process)
    assert code == 130
    assert "--resume" in output.splitlines()[-1]


def test_a_signal_stops_labelling_soon(written: Callable[..., Path], tmp_path: Path) -> None:
    slow = {"reward__functions": [f"{USERS}:sleeps"], "reward__timeout": 60, "reward__environment": ["SLOW"]}
    file = written(**slow, reward_model__prompts=4, reward_model__kind="outcome")
    process = start_command("label", file, "--out", tmp_path / "labels")
    while not (tmp_path / "labels/environment.json").is_file():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, output = exit_of(process)
    assert code == 130
    assert output.splitlines()[-1] == f"  gruppo label {file} --out {tmp_path}/labels --resume"


def test_a_stop_is_immediate_if_interruptible_and_otherwise_at_the_next_check() -> None:
    with stop_on_signals() as stop, stop_on_signals() as inner:
        assert inner is stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted), stop_on_signals(kills=True):
        _library_that_catches_exceptions()
    with pytest.raises(KeyboardInterrupt), stop_on_signals():  # in Python the caller gets Python's own exception
        _library_that_catches_exceptions()
    later = Stop()
    later.request()
    with pytest.raises(Interrupted), later.interruptible():
        pytest.fail("an earlier stop request takes effect when an interruptible block begins")


def _library_that_catches_exceptions() -> None:
    with stop_on_signals() as stop, stop.interruptible(), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGINT)
    pytest.fail("the code after the signal ran")


def test_the_lock_of_a_dead_process_is_free_although_its_child_lives(tmp_path: Path) -> None:
    """The process is killed; a child that it forked is still alive with copies of all file descriptors."""
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
def test_a_file_system_without_locks_is_reported(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(UsageError, match=r"its file system does not support locks \(.*\).*choose a folder on another"):
        RunFolder(tmp_path / "run")


def test_work_that_others_take_part_in_is_finished_before_a_stop() -> None:
    done = []

    def work() -> None:
        with stop_on_signals() as stop, stop.interruptible():
            with stop_held():
                signal.raise_signal(signal.SIGINT)
                done.append("with the others")
            done.append("after the stop")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["with the others"]
    with stop_held():  # signals are not handled here
        pass
