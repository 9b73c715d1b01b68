"""What is waited for is said after half a minute, at growing intervals, and when it went on."""

from __future__ import annotations

import threading

import pytest

from gruppo.errors import RunError
from gruppo.utils import waiting
from gruppo.utils.progress import NullProgress
from gruppo.utils.waiting import WaitWatcher, WatchedProgress, moved, waiting_for, watched


class Clock:
    """A time that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Lines:
    """A watcher's lines, without the time of day; "+" marks the end of a wait."""

    def __init__(self, clock: Clock) -> None:
        self.lines: list[str] = []
        self.clock, self.watcher = clock, WaitWatcher(self._tell)

    def _tell(self, text: str, over: bool) -> None:
        first, _, last = text.partition(" since ")
        self.lines.append("+" * over + first + last[len("00:00:00") :])

    def after(self, seconds: float) -> list[str]:
        """The new lines after these seconds."""
        self.clock.now += seconds
        self.watcher.look(self.clock.now)
        lines, self.lines = self.lines, []
        return lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def test_a_wait_is_said_after_half_a_minute_and_at_growing_intervals(clock: Clock) -> None:
    said = Lines(clock)
    with waiting_for("reward accuracy"):
        assert said.after(29) == []
        assert said.after(1) == ["waiting for reward accuracy (30 s)"]
        assert said.after(29) == []
        assert said.after(1) == ["waiting for reward accuracy (60 s)"]
        assert said.after(59) == []
        assert said.after(1) == ["waiting for reward accuracy (120 s)"]
        clock.now += 5
    assert said.after(3) == ["+went on after 125 s: reward accuracy"]
    assert said.after(1000) == []


def test_what_moves_on_is_not_waited_for(clock: Clock) -> None:
    said = Lines(clock)
    with waiting_for("the engine") as wait:
        for _ in range(5):
            assert said.after(29) == []
            wait.moved()
        assert said.after(31) == ["waiting for the engine (31 s)"]
        moved()
        assert said.after(4) == ["+went on after 31 s: the engine"]


def test_what_always_takes_long_is_said_once(clock: Clock) -> None:
    said = Lines(clock)
    for lines in (["waiting for a slow grader (40 s)"], [], []):
        with waiting_for("a slow grader"):
            assert said.after(40) == lines
        assert said.after(0) == (["+went on after 40 s: a slow grader"] if lines else [])
    with waiting_for("a slow grader"):
        assert said.after(80) == ["waiting for a slow grader (80 s)"]


def test_the_innermost_wait_is_said(clock: Clock) -> None:
    said = Lines(clock)
    with waiting_for("the step"):
        assert said.after(20) == []
        with waiting_for("the sandbox"):
            assert said.after(30) == ["waiting for the sandbox (30 s)"]
        assert said.after(29) == ["+went on after 30 s: the sandbox"]
        assert said.after(1) == ["waiting for the step (30 s)"]


def test_every_thread_has_waits_of_its_own(clock: Clock) -> None:
    said, begun, end = Lines(clock), threading.Event(), threading.Event()

    def wait() -> None:
        with waiting_for("another thread"):
            begun.set()
            end.wait()

    thread = threading.Thread(target=wait)
    with waiting_for("this thread"):
        thread.start()
        begun.wait()
        assert sorted(said.after(30)) == ["waiting for another thread (30 s)", "waiting for this thread (30 s)"]
        end.set()
        thread.join()
        assert said.after(1) == ["+went on after 30 s: another thread"]


def test_words_can_be_computed_when_they_are_needed(clock: Clock) -> None:
    said, busy = Lines(clock), ["one"]
    with waiting_for(lambda: f"rewards {busy}"):
        busy.append("two")
        assert said.after(30) == ["waiting for rewards ['one', 'two'] (30 s)"]


def test_a_wait_that_ends_with_an_error_is_over(clock: Clock) -> None:
    said = Lines(clock)

    def fail() -> None:
        with waiting_for("a file"):
            assert said.after(30) == ["waiting for a file (30 s)"]
            raise RunError("the disk is full")

    with pytest.raises(RunError):
        fail()
    assert said.after(1000) == ["+went on after 30 s: a file"]


def test_a_wait_that_was_left_open_ends_with_the_one_around_it(clock: Clock) -> None:
    said = Lines(clock)
    with waiting_for("outer"):
        left_open = waiting_for("inner")
        left_open.__enter__()
        assert said.after(30) == ["waiting for inner (30 s)"]
    assert said.after(1) == ["+went on after 30 s: inner"]
    left_open.__exit__(None, None, None)
    with waiting_for("the next"):
        assert said.after(30) == ["waiting for the next (30 s)"]


def test_a_wait_can_be_ended_by_another_thread(clock: Clock) -> None:
    """The garbage collector ends generators in any thread."""
    said, left_open = Lines(clock), waiting_for("left open")
    left_open.__enter__()
    thread = threading.Thread(target=left_open.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert said.after(30) == []
    with waiting_for("the next"):
        assert said.after(30) == ["waiting for the next (30 s)"]


def test_a_progress_bar_is_a_wait(clock: Clock) -> None:
    said = Lines(clock)
    with WatchedProgress(NullProgress()).bar("Updating", 2, "batches") as advance:
        assert said.after(29) == []
        advance(1)
        assert said.after(29) == []
        advance(0)  # a tick, not progress
        assert said.after(1) == ['waiting for progress of "Updating" (30 s)']


def test_a_watcher_inside_another_is_the_same() -> None:
    with watched(NullProgress()) as (_, outer):
        with watched(NullProgress()) as (_, inner):
            assert inner is outer
        assert [thread.name for thread in threading.enumerate()].count("waits") == 1
    with watched(NullProgress()) as (_, later):
        assert later is not outer


def test_the_thread_goes_on_when_a_line_cannot_be_written() -> None:
    told, second = list[str](), threading.Event()

    def tell(text: str, over: bool) -> None:
        told.append(text)
        if len(told) > 1:
            second.set()
        raise OSError("no space left on device")

    watcher = WaitWatcher(tell, first=0.001)
    with watcher.running(every=0.001), waiting_for("anything"):
        assert second.wait(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "waits"]
