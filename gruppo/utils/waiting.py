"""What this process waits for, and a watcher that says so when it has waited long.

Code that can block registers what it waits for, with `waiting_for`. The innermost wait of a thread counts: the outer
ones go on as it begins and as it ends. To register a wait costs microseconds, and changes no number.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from gruppo.errors import RunError
from gruppo.utils.progress import Advance, Progress

FIRST_SECONDS = 30.0  # until a wait is reported
LOOK_SECONDS = 5.0  # between two looks of the watcher

# Called with a line of text, and whether the wait is over.
Tell = Callable[[str, bool], None]


class Wait:
    """Something that a thread waits for. `since`: when it began, or last moved on, in seconds of `time.monotonic`."""

    def __init__(self, what: str | Callable[[], str], outer: Wait | None) -> None:
        self._what, self.outer = what, outer
        self.inner = 0  # waits of the same thread that are open inside this one
        self.since = time.monotonic()
        self.over = False
        self.thread = threading.get_ident()

    def moved(self) -> None:
        """What is waited for has moved on."""
        self.since = time.monotonic()

    @property
    def what(self) -> str:
        """What is waited for, in words."""
        return self._what if isinstance(self._what, str) else self._what()


_open: dict[Wait, None] = {}  # the waits of all threads
_innermost = threading.local()


@contextmanager
def waiting_for(what: str | Callable[[], str]) -> Iterator[Wait]:
    """Register what the block waits for. `what`: words such as "the sandbox", or a function that returns them, which
    the watcher calls in its own thread."""
    outer: Wait | None = getattr(_innermost, "wait", None)
    while outer is not None and outer.over:
        outer = outer.outer
    wait = Wait(what, outer)
    if outer is not None:
        outer.inner += 1
        outer.moved()
    _open[wait], _innermost.wait = None, wait
    try:
        yield wait
    finally:
        while not wait.over:
            # Waits inside it that were left open, as by an error in another library, end with it. A generator that is
            # left can be ended by the garbage collector in any thread.
            _end(_innermost.wait if wait.thread == threading.get_ident() else wait)


def _end(wait: Wait) -> None:
    wait.moved()
    wait.over = True
    del _open[wait]
    if wait.thread == threading.get_ident():
        _innermost.wait = wait.outer
    if wait.outer is not None:
        wait.outer.inner -= 1
        wait.outer.moved()


def moved() -> None:
    """What the innermost wait of this thread waits for has moved on."""
    wait: Wait | None = getattr(_innermost, "wait", None)
    if wait is not None:
        wait.moved()


@dataclass
class _Told:
    """A wait that was reported. `what`: as it was reported; `again`: seconds of waiting until the next report."""

    what: str
    since: float
    again: float


class WaitWatcher:
    """Says what is waited for after `first` seconds, again each time the wait is twice as long, and when it went on.

    Something that was waited for before is reported once it takes twice as long as it took then.
    """

    def __init__(self, tell: Tell, first: float = FIRST_SECONDS) -> None:
        self._tells, self.first = [tell], first
        self._looking = threading.Lock()
        self._told: dict[Wait, _Told] = {}
        self._longest: dict[str, float] = {}  # seconds of waits that were reported and ended, by what was waited for

    @contextmanager
    def running(self, every: float = LOOK_SECONDS) -> Iterator[None]:
        """Look every few seconds (`every`), in a thread, until the end of the block."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(every):
                self.look(time.monotonic())

        thread = threading.Thread(target=look, name="waits", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextmanager
    def telling(self, tell: Tell) -> Iterator[None]:
        """Report to another function, too, inside the block; at its end the waits that are over."""
        self._tells.append(tell)
        try:
            yield
        finally:
            self.look(time.monotonic())
            self._tells.remove(tell)

    def look(self, now: float) -> None:
        """Report what is due. `now`: of `time.monotonic`."""
        with self._looking:
            self._look(now)

    def _look(self, now: float) -> None:
        for wait, told in list(self._told.items()):
            if wait.over or wait.since > told.since:
                seconds = wait.since - told.since
                self._longest[told.what] = max(seconds, self._longest.get(told.what, 0.0))
                del self._told[wait]
                self._tell(f"went on after {seconds:.0f} s: {told.what}", over=True)
        for wait in list(_open):
            since = wait.since
            if wait.over or wait.inner or now - since < self.first:
                continue
            before, what = self._told.get(wait), wait.what
            due = max(self.first, 2 * self._longest.get(what, 0.0)) if before is None else before.again
            if now - since >= due:
                self._told[wait] = _Told(what if before is None else before.what, since, 2 * (now - since))
                began = datetime.now() - timedelta(seconds=now - since)
                self._tell(f"waiting for {what} since {began:%H:%M:%S} ({now - since:.0f} s)", over=False)

    def _tell(self, text: str, over: bool) -> None:
        for tell in self._tells:
            with suppress(OSError, RunError):  # a full disk, or a console that is gone: the thread goes on
                tell(text, over)


class WatchedProgress:
    """A `Progress` whose bars are registered as waits, which move on with the bar."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See `Progress`."""
        with waiting_for(f'progress of "{label}"') as wait, self.shown.bar(label, total, unit) as show:

            def advance(amount: float) -> None:
                if amount:
                    wait.moved()
                show(amount)

            yield advance

    def note(self, text: str) -> None:
        """See `Progress`."""
        self.shown.note(text)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Progress`."""
        self.shown.step(metrics)


_outermost: WaitWatcher | None = None  # of the blocks of `watched` that are open


@contextmanager
def watched(progress: Progress) -> Iterator[tuple[WatchedProgress, WaitWatcher]]:
    """Watch what the block waits for, and show it as notes. Yields the progress to use inside, and the watcher, which
    is the one around this block if there is one."""
    global _outermost
    if _outermost is not None:
        yield WatchedProgress(progress), _outermost
        return
    _outermost = watcher = WaitWatcher(lambda text, _: progress.note(text), FIRST_SECONDS)
    try:
        with watcher.running(LOOK_SECONDS):
            yield WatchedProgress(progress), watcher
    finally:
        _outermost = None
