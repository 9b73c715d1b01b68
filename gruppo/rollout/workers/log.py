"""What reward processes print: at the end of a file that cannot grow without bound."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from gruppo.errors import UsageError

# rewards.log and, before it, rewards.old.log.
MOST_BYTES = 8 * 2**20
_CHUNK = 2**16


class Output:
    """A pipe for what processes print, which a thread empties into the file. What is printed last is kept: a file that
    is full becomes `old_log`, in place of the one before. A full disk loses output and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.open("ab").close()
        except OSError as error:
            raise UsageError(f"{path}: cannot be written to ({error}); remove it") from error
        self._read, self.descriptor = os.pipe()
        self._thread = threading.Thread(target=self._empty, name="rewards.log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No process writes any more: the rest goes into the file."""
        os.close(self.descriptor)
        self._thread.join(5.0)  # a process that got away from us can hold the pipe open

    def _empty(self) -> None:
        with os.fdopen(self._read, "rb", buffering=0) as pipe:
            while chunk := pipe.read(_CHUNK):
                with contextlib.suppress(OSError):
                    self._append(chunk)

    def _append(self, chunk: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(chunk)
            full = file.tell() >= MOST_BYTES
        if full:
            self.path.replace(old_log(self.path))


def old_log(path: Path) -> Path:
    """Where the output is that was printed before what is in the log: rewards.old.log."""
    return path.with_suffix(f".old{path.suffix}")
