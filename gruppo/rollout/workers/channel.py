"""The trainer's ends of the pipes to a worker process.

Nothing that the process does can make the trainer wait: it may stop reading, hang in the middle of an answer, or write
something other than an answer.
"""

from __future__ import annotations

import os
import struct

# An answer contains G numbers and the values that a function logged. More than this is a mistake.
MOST_BYTES = 64 * 2**20
_CHUNK = 2**16
_LONG = 2**31


class Channel:
    """Sends and receives whole messages, framed as in multiprocessing.connection.Connection, which the process uses."""

    def __init__(self, read: int, write: int) -> None:
        for descriptor in (read, write):
            os.set_blocking(descriptor, False)
        self.read, self.write = read, write
        self._incoming, self._outgoing = bytearray(), bytearray()

    @property
    def waits_to_write(self) -> bool:
        """Whether part of a message is waiting because the pipe is full."""
        return bool(self._outgoing)

    def send(self, message: bytes) -> None:
        """Send as much of a message as the pipe takes; `flush` sends the rest."""
        size = len(message)
        self._outgoing += struct.pack("!i", size) if size < _LONG else struct.pack("!iQ", -1, size)
        self._outgoing += message
        self.flush()

    def flush(self) -> None:
        """Send waiting data as far as the pipe takes it. If the process is gone, this shows when its answer is read."""
        try:
            while self._outgoing:
                with memoryview(self._outgoing) as whole, whole[: 16 * _CHUNK] as part:
                    sent = os.write(self.write, part)
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()

    def receive(self) -> bytes | None:
        """The next message, or None while it is incomplete. Raises EOFError if the process is gone, and ValueError for
        invalid data."""
        while True:
            if len(self._incoming) >= 4:
                (size,) = struct.unpack_from("!i", self._incoming)
                if not 0 <= size <= MOST_BYTES:
                    raise ValueError(f"a message of {size} bytes")
                if len(self._incoming) >= 4 + size:
                    message = bytes(self._incoming[4 : 4 + size])
                    del self._incoming[: 4 + size]
                    return message
            try:
                chunk = os.read(self.read, _CHUNK)
            except BlockingIOError:
                return None
            if not chunk:
                raise EOFError
            self._incoming += chunk

    def close(self) -> None:
        """Close both ends."""
        for descriptor in (self.read, self.write):
            os.close(descriptor)
