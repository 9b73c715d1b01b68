"""A short `make torture-cluster`, in a separate process that forks."""

from __future__ import annotations

import subprocess
import sys


def test_runs_whose_processes_die_end_like_undisturbed_runs() -> None:
    command = [sys.executable, "-m", "tests.torture_cluster", "--faults", "3", "--cases", "launched ranks; engines"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.stdout.splitlines()[-1].endswith("faults, 0 runs failed"), done.stdout + done.stderr
    assert done.returncode == 0
