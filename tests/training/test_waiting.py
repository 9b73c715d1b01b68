"""A run says what it waits for, on the console and in its events."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from gruppo.training.api import train
from gruppo.types import Group
from gruppo.ui.advice import advice_for
from gruppo.ui.live import _event
from gruppo.utils import waiting
from gruppo.utils.progress import NullProgress
from tests.small_runs import ROWS, recipe

BLOCKS = """
import time
from pathlib import Path

def blocks(completions, **_):
    while not Path({file!r}).exists():
        time.sleep(0.01)
    return [float(len(text)) for text in completions]
"""


class Notes(NullProgress):
    """Calls `then` at the first note that begins with `awaited`."""

    def __init__(self, awaited: str, then: Any) -> None:
        self.awaited, self.then, self.lines = awaited, then, list[str]()

    def note(self, text: str) -> None:
        self.lines.append(text)
        if text.startswith(self.awaited):
            self.then()


def run(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], out: Path, notes: Notes, **arguments: Any) -> None:
    """A run that says at once what it waits for."""
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.01)
    train(settings, prompts=ROWS, out=out, progress=notes, **arguments)


def events(out: Path) -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "waiting"]


def test_a_slow_reward_is_named(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reward = tmp_path / "gate", tmp_path / "slow.py"
    reward.write_text(BLOCKS.format(file=str(gate)))
    settings = recipe(tiny_folder, run__steps=1, reward__functions=[f"{reward}:blocks"], reward__timeout=600)
    notes = Notes("waiting for reward blocks since ", gate.touch)
    run(monkeypatch, settings, tmp_path / "run", notes)
    assert any(line.startswith("went on after ") and line.endswith(": reward blocks") for line in notes.lines)
    first, *_, last = [event for event in events(tmp_path / "run") if "reward blocks" in event["message"]]
    assert (first["step"], first["state"], last["state"]) == (1, "begins", "passed")
    assert "Look at the part" in advice_for(_event(first))
    assert advice_for(_event(last)) == ""


def test_a_callback_that_blocks_is_named(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def uploads(step: int, metrics: dict[str, Any], groups: list[Group]) -> None:
        assert gate.wait(600)

    notes = Notes("waiting for the callback ", gate.set)
    run(monkeypatch, recipe(tiny_folder, run__steps=1), tmp_path / "run", notes, callbacks=[uploads])
    assert any("uploads since " in line for line in notes.lines)
    assert events(tmp_path / "run")[-1]["state"] == "passed"
