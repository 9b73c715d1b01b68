"""Ending a run at a safe point: the first SIGINT or SIGTERM asks for it, the second ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it, and a process that is killed would leave it so


class Interrupted(BaseException):
    """Raised at a safe point after a stop was asked for. Like KeyboardInterrupt no `except Exception` catches it."""


class Stop:
    """A request to stop, looked at only where stopping loses nothing."""

    def __init__(self, kills: bool = False) -> None:
        """`kills`: see `stop_on_signals`."""
        self.requested, self.kills = False, kills
        self.signal: int | None = None  # which one asked for it
        self._droppable = 0

    def request(self) -> None:
        """Ask the run to stop at the next safe point, which is here and now inside of `interruptible`."""
        self.requested = True
        if self._droppable:
            raise Interrupted

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for. Call it where nothing is half done."""
        if self.requested:
            raise Interrupted

    def raise_for_python(self, error: BaseException | None = None) -> None:
        """In a process that is more than a run, raise what Python raises for the signal that stopped it:
        KeyboardInterrupt, or SystemExit for SIGTERM. Everything is saved by then."""
        if self.signal == signal.SIGINT and not self.kills:
            raise KeyboardInterrupt from error
        if self.signal == signal.SIGTERM and not self.kills:
            raise SystemExit(128 + signal.SIGTERM) from error

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What the block does may be dropped at any moment, so that a stop need not wait: imports, loading, sampling,
        whatever is begun again by a resume."""
        self._droppable += 1
        try:
            self.check()
            yield
        finally:
            self._droppable -= 1


_active: list[Stop] = []


@contextmanager
def stop_on_signals(kills: bool = False) -> Iterator[Stop]:
    """SIGINT and SIGTERM request a stop; a second one raises KeyboardInterrupt or, with `kills`, which is for a process
    that is a run and nothing else, ends it like SIGKILL would, whatever it computes. Handlers are put back at the end,
    where an `Interrupted` becomes KeyboardInterrupt (SystemExit for SIGTERM), unless `kills`. Inside another such block
    it is that block's stop."""
    if _active or threading.current_thread() is not threading.main_thread():
        yield _active[-1] if _active else Stop()
        return
    stop = Stop(kills)

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.signal = number
        if kills:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            _tell("stopping at the next safe point; once more stops at once")
        stop.request()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    _active.append(stop)
    try:
        yield stop
    except Interrupted as error:
        stop.raise_for_python(error)
        raise
    finally:
        _active.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(text: str) -> None:
    """Written past all buffers and locks, which the interrupted code may hold."""
    shown = _SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(2, f"{shown}gruppo: {text}\n".encode())


def exit_on_signals() -> None:
    """From now on SIGINT and SIGTERM end the process with 130 and 143, without a traceback, cleaning up on the way."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, handle)
