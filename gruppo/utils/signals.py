"""Stopping a run on signals: the first SIGINT or SIGTERM stops it at a safe point, the second immediately."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide the cursor, and a killed process would leave it hidden


class Interrupted(BaseException):
    """Raised at a safe point after a stop request. Like KeyboardInterrupt, `except Exception` does not catch it."""


class Stop:
    """A request to stop, checked only where stopping loses nothing."""

    def __init__(self, kills: bool = False) -> None:
        """`kills`: see `stop_on_signals`."""
        self.requested, self.kills = False, kills
        self.signal: int | None = None  # the signal that requested it
        self._droppable = self._held = 0

    def request(self) -> None:
        """Request a stop at the next safe point. Inside `interruptible` that is now: raises Interrupted."""
        self.requested = True
        self._end()

    def _end(self) -> None:
        if self._droppable and not self._held:
            raise Interrupted

    def check(self) -> None:
        """Raise Interrupted if a stop was requested. Call this only where no work is half done."""
        if self.requested:
            raise Interrupted

    def raise_for_python(self, error: BaseException | None = None) -> None:
        """Raise Python's exception for the signal that stopped the run: KeyboardInterrupt, or SystemExit for SIGTERM.

        Call this after everything is saved. With `kills`, when the process is only a run, it does nothing.
        """
        if self.signal == signal.SIGINT and not self.kills:
            raise KeyboardInterrupt from error
        if self.signal == signal.SIGTERM and not self.kills:
            raise SystemExit(128 + signal.SIGTERM) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a stop request wait for the end of the block, even inside `interruptible`."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.requested:
            self._end()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a stop request end the block at any moment.

        For work that is not lost because a resumed run repeats it: imports, loading, sampling.
        """
        self._droppable += 1
        try:
            self.check()
            yield
        finally:
            self._droppable -= 1


_active: list[Stop] = []


def stop_held() -> AbstractContextManager[None]:
    """The active `Stop.held`, for work that others take part in; nothing if signals are not handled."""
    return _active[-1].held() if _active else nullcontext()


@contextmanager
def stop_on_signals(kills: bool = False) -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into stop requests for the duration of the block.

    A second signal raises KeyboardInterrupt. With `kills`, for a process that is only a run, it ends the process
    immediately, as SIGKILL would. Afterwards the previous handlers are restored and, without `kills`, an `Interrupted`
    becomes KeyboardInterrupt (SystemExit for SIGTERM). Nested blocks share the outer block's Stop. Outside the main
    thread signals are not handled.
    """
    if _active or threading.current_thread() is not threading.main_thread():
        yield _active[-1] if _active else Stop()
        return
    stop = Stop(kills)

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.signal = number
        if kills:
            for other in _SIGNALS:
                signal.signal(other, signal.SIG_DFL)
        _write("stopping at the next safe point; a second signal stops immediately")
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


def _write(text: str) -> None:
    """Write to standard error without buffers and locks, which the interrupted code may hold."""
    prefix = _SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(2, f"{prefix}gruppo: {text}\n".encode())


def exit_on_signals() -> None:
    """From now on, let SIGINT and SIGTERM exit the process with 130 and 143, with cleanup and without a traceback."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, handle)
