"""A short `make torture`: ten kills over three methods, in a separate process that forks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import torture


def test_killed_runs_end_like_uninterrupted_runs() -> None:
    command = [sys.executable, "-m", "tests.torture", "--kills", "10", "--cases", "; ".join(torture.QUICK), "--forked"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "10 passed, 0 failed", done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ({"a": b"1", "b": 2}, []),
        ({"a": b"0", "b": 2}, ["a differs"]),
        ({"b": 2}, ["a is missing"]),
        ({"a": b"1", "b": 2, "metrics.jsonl, line 9": {}}, ["metrics.jsonl, line 9 is unexpected"]),
    ],
)
def test_differences_are_reported(got: dict, expected: list) -> None:
    assert torture.differences(got, {"a": b"1", "b": 2}) == expected
