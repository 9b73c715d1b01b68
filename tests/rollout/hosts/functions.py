"""Rewards and environments that wait until the test lets them go on; see `Gate`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gruppo import Turn

if "GATE_OF_IMPORT" in os.environ:
    _gate = Path(os.environ["GATE_OF_IMPORT"])
    (_gate / f"import-{os.getpid()}").touch()
    while not (_gate / "open").exists():
        time.sleep(0.01)


def waits(gate, name):
    """Say that a call is under way, and wait for the gate."""
    Path(gate, f"{name}-{os.getppid()}").touch()
    while not Path(gate, "open").exists():
        time.sleep(0.01)


def length(completions, gate, log_metric, log_extra, **kwargs):
    waits(gate[0], completions[0])
    log_metric("length", len(completions[0]))
    log_extra("seen", [text.upper() for text in completions])
    print(f"scored {completions[0]}")
    return [float(len(text)) for text in completions]


def slow(completions, **kwargs):
    time.sleep(60 if completions[0] == "slow" else 0)
    return [1.0] * len(completions)


def ends_its_host(completions, **kwargs):
    """Kills the grandparent of this process: the actor."""
    if completions[0] == "poison":
        stat = Path(f"/proc/{os.getppid()}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), 9)
        time.sleep(60)
    return [1.0] * len(completions)


class Counts:
    """Answers with how many letters it was told so far."""

    def __init__(self):
        self.told = 0

    def reset(self, row, seed):
        self.gate = row["gate"]
        return "begin"

    def step(self, text):
        if text == "wait":
            waits(self.gate, "turn")
        self.told += len(text)
        return Turn(str(self.told))

    def get_reward(self):
        return float(self.told)


_left = []


def leaves_a_process(completions, **kwargs):
    """Starts a process in a session of its own, once."""
    import subprocess

    if not _left:
        _left.append(subprocess.Popen(["sleep", "1000"], start_new_session=True))
    return [sum("a" <= letter <= "m" for letter in text) / max(1, len(text)) for text in completions]
