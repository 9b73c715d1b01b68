"""Output of worker processes, appended to a log file of bounded size."""

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
    """A pipe for the output of processes, which a thread copies into the log file.

    The latest output is kept: a full file is renamed to `old_log` and replaces the previous one. A full disk loses
    output and has no other effect.
    """

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
        """Write the rest of the output to the file. No process may write any more."""
        os.close(self.descriptor)
        self._thread.join(5.0)  # a process that could not be killed can keep the pipe open

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
    """Path of the older output that is no longer in the log: rewards.old.log."""
    return path.with_suffix(f".old{path.suffix}")
