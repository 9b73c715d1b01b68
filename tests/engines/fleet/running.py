"""`gruppo train` in a process of its own, and what becomes of its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from tests.small_runs import ROWS, recipe


def events(out: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def started(
    model: str,
    folder: Path,
    *launcher: str,
    environment: dict[str, str] | None = None,
    reward: str = "tests/rewards/functions.py:likes_letters",
    **changes: Any,
) -> subprocess.Popen[str]:
    """`gruppo train` in a process group of its own."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = recipe(model, task__name=str(rows), reward__functions=[str(Path(reward).absolute())], **changes)
    (folder / "recipe.toml").write_text(tomli_w.dumps(settings))
    command = [sys.executable, *launcher, "-m", "gruppo.cli.main", "train", str(folder / "recipe.toml")]
    return subprocess.Popen(
        [*command, "--out", str(folder / "run")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip


def wait_for_steps(out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_for_the_end(processes: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive := [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def end_by_signal(process: subprocess.Popen[str], number: signal.Signals, out: Path) -> tuple[list[str], str]:
    """Send a signal to a run of 2000 steps, and wait until none of its processes is left. Ctrl-C reaches the whole
    group of processes. After SIGKILL, Ray's agents need a minute to notice.

    Returns the names of the processes that the run had started, and what it has written.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    names = {child.pid: child.name() for child in children}
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    agents = ("DashboardAgent", "RuntimeEnvAgent")
    wait_for_the_end([child for child in children if not names[child.pid].endswith(agents)], 60)
    wait_for_the_end(children, 180 if number == signal.SIGKILL else 1)
    if number != signal.SIGKILL:
        done = len((out / "metrics.jsonl").read_text().splitlines())
        assert f"Interrupted after step {done} of 2000; everything is saved" in output, output
        assert "Traceback" not in output
    return list(names.values()), output
