"""A short `make torture`: ten kills over three methods. In a process of its own, which forks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import torture


def test_runs_that_are_killed_come_out_as_those_that_nobody_kills() -> None:
    command = [sys.executable, "-m", "tests.torture", "--kills", "10", "--cases", "; ".join(torture.QUICK), "--forked"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "10 passed, 0 failed", done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("got", "told"),
    [
        ({"a": b"1", "b": 2}, []),
        ({"a": b"0", "b": 2}, ["a differs"]),
        ({"b": 2}, ["a is missing"]),
        ({"a": b"1", "b": 2, "metrics.jsonl, line 9": {}}, ["metrics.jsonl, line 9 is there"]),
    ],
)
def test_differences_are_told(got: dict, told: list) -> None:
    assert torture.differences(got, {"a": b"1", "b": 2}) == told
