"""Output of worker processes, appended to a log file of bounded size."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gruppo.errors import UsageError
from gruppo.utils.last_lines import LAST_BYTES, last_lines

# rewards.log and, before it, rewards.old.log.
MOST_BYTES = 8 * 2**20
_CHUNK = 2**16
_CLOSE_SECONDS = 5.0  # a process that could not be killed can keep its pipe open
_END_SECONDS = 1.0  # the same, when the last lines are asked for


class LogFile:
    """A file that keeps what was appended last: when it is full, it is renamed to `old_log` and replaces the previous
    one. A full disk loses output and has no other effect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.open("ab").close()
        except OSError as error:
            raise UsageError(f"{path}: cannot be written to ({error}); remove it") from error

    def append(self, chunk: bytes) -> None:
        """Write output to the end of the file."""
        with contextlib.suppress(OSError):
            with self.path.open("ab", buffering=0) as file:
                file.write(chunk)
                full = file.tell() >= MOST_BYTES
            if full:
                self.path.replace(old_log(self.path))


class Printer:
    """The pipe that one process prints to. `descriptor`: the end to pass to the process. It is open here until the end
    of a `with` block."""

    def __init__(self) -> None:
        self.read, self.descriptor = os.pipe()
        self._last = b""
        self._ended = threading.Event()

    def __enter__(self) -> Printer:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def take(self) -> bytes:
        """Some output, which must be there; empty if the process and all that it has started have ended."""
        chunk = os.read(self.read, _CHUNK)
        self._last = (self._last + chunk)[-LAST_BYTES:]
        return chunk

    def end(self) -> None:
        """Nothing more is read."""
        os.close(self.read)
        self._ended.set()

    def last_lines(self) -> list[str]:
        """The last lines that a process wrote which has ended."""
        self._ended.wait(_END_SECONDS)
        return last_lines(self._last)


class Output:
    """The output of processes, one pipe for each, which a thread reads and passes to `write`."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._woken, self._wakes = os.pipe()
        self._printers: dict[int, Printer] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._copy, name="output", daemon=True)
        self._thread.start()

    def open(self) -> Printer:
        """A pipe for a process that is about to start."""
        printer = Printer()
        self._printers[printer.read] = printer
        os.write(self._wakes, b".")
        return printer

    def close(self) -> None:
        """Pass on the rest of the output. The processes have ended."""
        self._closed = True
        os.write(self._wakes, b".")
        self._thread.join(2 * _CLOSE_SECONDS)
        if not self._thread.is_alive():
            os.close(self._woken)
            os.close(self._wakes)

    def _copy(self) -> None:
        deadline: float | None = None
        while not self._closed or (self._printers and time.monotonic() < (deadline or float("inf"))):
            if self._closed and deadline is None:
                deadline = time.monotonic() + _CLOSE_SECONDS
            poll = select.poll()
            for descriptor in (self._woken, *list(self._printers)):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(None if deadline is None else 100):
                if descriptor == self._woken:
                    os.read(self._woken, _CHUNK)
                elif chunk := self._printers[descriptor].take():
                    self._write(chunk)
                else:
                    self._printers.pop(descriptor).end()
        for printer in self._printers.values():
            printer.end()


def old_log(path: Path) -> Path:
    """Path of the older output that is no longer in the log: rewards.old.log."""
    return path.with_suffix(f".old{path.suffix}")
