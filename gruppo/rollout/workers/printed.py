"""What a function prints: its output goes to the log of the process as ever, and its beginning is kept."""

from __future__ import annotations

import sys
from typing import Any, TextIO

MOST = 16_384  # characters that are kept of one call


class _Tee:
    """A stream of text that also keeps what is written to it."""

    def __init__(self, stream: TextIO, printed: Printed) -> None:
        self._stream, self._printed = stream, printed

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        self._printed.keep(text)
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Printed:
    """Keeps what Python code writes to sys.stdout and sys.stderr. What programs and C code write is only in the log."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._size = 0
        sys.stdout, sys.stderr = _Tee(sys.stdout, self), _Tee(sys.stderr, self)

    def keep(self, text: str) -> None:
        """Keep a text, as far as there is room."""
        if self._size < MOST:
            self._parts.append(text[: MOST - self._size])
        self._size += len(text)

    def take(self) -> str:
        """What was printed since the last time; a note says how much more there was."""
        text, more = "".join(self._parts), self._size - MOST
        self._parts, self._size = [], 0
        return f"{text}\n[{more} more characters in rewards.log]" if more > 0 else text
