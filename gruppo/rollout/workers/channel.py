"""The trainer's ends of the pipes to a reward process. Nothing that happens at the other ends can make it wait: a
process may stop reading, hang in the middle of an answer, or write into the pipe what is no answer."""

from __future__ import annotations

import os
import struct

# An answer holds G numbers and what a function logged; more than this is a mistake.
MOST_BYTES = 64 * 2**20
_CHUNK = 2**16
_LONG = 2**31


class Channel:
    """Whole messages, framed as multiprocessing.connection.Connection does, which the process has at its ends."""

    def __init__(self, read: int, write: int) -> None:
        for descriptor in (read, write):
            os.set_blocking(descriptor, False)
        self.read, self.write = read, write
        self._incoming, self._outgoing = bytearray(), bytearray()

    @property
    def waits_to_write(self) -> bool:
        """Part of a message is still here, as the pipe is full."""
        return bool(self._outgoing)

    def send(self, message: bytes) -> None:
        """Send as much of the message as the pipe takes; `flush` sends the rest."""
        size = len(message)
        self._outgoing += struct.pack("!i", size) if size < _LONG else struct.pack("!iQ", -1, size)
        self._outgoing += message
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the pipe takes it. That a process is gone is noticed when its answer is read."""
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
        """The next message, or None while it is not whole. Raises EOFError where the process is gone, and ValueError
        for what is no message."""
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
