"""The recorder, its sinks, and status.json."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gruppo import Callback
from gruppo.runs import status as status_module
from gruppo.runs.recorder import Recorder
from gruppo.runs.status import StatusFile, read_status
from gruppo.training.api import train
from gruppo.utils.progress import NullProgress
from tests.small_runs import ROWS, killed, recipe, small_run


class MemorySink:
    """Keeps everything, as a tracker would."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, Any]] = []
        self.events: list[Mapping[str, Any]] = []
        self.phases: list[tuple[str, float, float | None, str]] = []

    def step(self, values: Mapping[str, Any]) -> None:
        self.steps.append(dict(values))

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))

    def progress(self, phase: str, done: float, total: float | None, unit: str) -> None:
        self.phases.append((phase, done, total, unit))


def test_every_sink_receives_everything() -> None:
    sinks = [MemorySink(), MemorySink()]
    recorder = Recorder(NullProgress(), sinks)
    recorder.step({"step": 1, "reward/mean": 0.5})
    recorder.event("memory", "less of it", 1, slots=4)
    with recorder.bar("Sampling", 8, "completions") as advance:
        advance(3)
        advance(5)
    for sink in sinks:
        assert sink.steps == [{"step": 1, "reward/mean": 0.5}]
        assert sink.events == [{"kind": "memory", "message": "less of it", "step": 1, "slots": 4}]
        assert sink.phases == [("Sampling", done, 8, "completions") for done in (0, 3, 8)]


def test_status_of_a_finished_run(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", run__steps=2)
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.step, status.steps, status.attempt) == ("done", 2, 2, 1)
    assert status.process_id == os.getpid()
    assert datetime.now(UTC) - datetime.fromisoformat(status.heartbeat) < timedelta(hours=1)


def test_status_during_a_run(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a write at every change: the phases of a step, in their order, and the progress of each."""
    monkeypatch.setattr(status_module, "SECONDS", 0.0)
    seen: list[dict[str, Any]] = []
    update = StatusFile.update

    def watched(self: StatusFile, *args: Any, **changes: Any) -> None:
        update(self, *args, **changes)
        seen.append(json.loads(self.path.read_text()))

    monkeypatch.setattr(StatusFile, "update", watched)
    small_run(tiny_folder, tmp_path / "run", run__steps=1)
    phases = list(dict.fromkeys(status["phase"] for status in seen))
    assert next(phase for phase in phases if phase in {"Sampling", "Scoring", "Updating"}) == "Sampling"
    assert phases.index("Sampling") < phases.index("Updating")
    sampling = [status for status in seen if status["phase"] == "Sampling"]
    assert sampling[0]["done"] == 0
    assert sampling[-1]["done"] == sampling[-1]["total"]
    assert all(status["state"] == "running" for status in seen[:-1])


def test_a_resume_is_visible_to_readers(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that follows metrics.jsonl has read steps that the resume truncates and writes again."""
    out = tmp_path / "run"
    with killed(monkeypatch, "gruppo.training.policy_trainer.PolicyTrainer.update", 4):
        small_run(tiny_folder, out)
    before = read_status(out)
    length = (out / "metrics.jsonl").stat().st_size
    assert before is not None
    assert before.attempt == 1
    kept: dict[str, int] = {}

    class Watch(Callback):
        def on_step(self, *_: object) -> None:
            status = read_status(out)
            assert status is not None
            kept.update(status.truncated_to)

    train(recipe(tiny_folder), prompts=ROWS, out=out, resume=True, progress=False, callbacks=[Watch()])
    after = read_status(out)
    assert after is not None
    assert after.attempt == 2
    assert 0 < kept["metrics.jsonl"] < length
    assert set(kept) == {"metrics.jsonl", "events.jsonl"}


@pytest.mark.parametrize("content", ["", "[]", '{"attempt": "x"}', "\x00" * 80, '{"step": []}'])
def test_a_damaged_status_is_no_status(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
    StatusFile(tmp_path, 3).update(now=True, phase="Sampling")
    status = read_status(tmp_path)
    assert status is not None
    assert status.phase == "Sampling"


def test_an_unwritable_status_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    file = StatusFile(tmp_path)
    file.update(now=True)
    file.update(now=True, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_what_a_thread_reports_can_be_held() -> None:
    """Events and notes of that thread alone; its progress is not shown."""
    sink, notes, entered, left = MemorySink(), list[str](), threading.Event(), threading.Event()
    console = NullProgress()
    console.note = notes.append  # type: ignore[method-assign]
    recorder, held = Recorder(console, [sink]), list[dict[str, Any]]()

    def other() -> None:
        with recorder.held() as kept:
            recorder.event("memory", "less", 3, slots=4)
            recorder.note("less memory")
            with recorder.bar("Sampling", 2, "tokens") as advance:
                advance(1)
            held.extend(kept)
            entered.set()
            left.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    recorder.event("resume", "continued", 2)
    assert ([event["kind"] for event in sink.events], notes, sink.phases) == (["resume"], [], [])
    left.set()
    thread.join()
    recorder.release(json.loads(json.dumps(held)))
    assert sink.events[1:] == [{"kind": "memory", "message": "less", "step": 3, "slots": 4}]
    assert notes == ["less memory"]
