"""Ending a run at a safe point: the first SIGINT or SIGTERM asks for it, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818  not an error
    """Raised at a safe point after a stop was asked for."""


class Stop:
    """A request to stop, looked at only where stopping loses nothing."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask the run to stop at the next safe point."""
        self.requested = True

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for. Call it where nothing is half done."""
        if self.requested:
            raise Interrupted


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM request a stop; a second one raises KeyboardInterrupt at once. Handlers are put back."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
