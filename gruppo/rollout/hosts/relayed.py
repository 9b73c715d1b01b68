"""A process on a reward host, as the run sees it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from gruppo.rollout.hosts.actor import Answered, Ended, Invalid
from gruppo.rollout.workers.process import Ending, LostError

Tell = Callable[..., None]  # called with the name of a method of the host, the number of the process, and arguments


class Relayed:
    """See `Process` and `Messages`, of which this is both.

    `lock`: held while anything changes; `tell`: lets the host do something, or keeps it until the host is there;
    `report`: reports what has happened to hosts, and raises RunError if there are none any more.
    """

    waits_to_write = False

    def __init__(
        self, number: int, delay: float, lock: threading.RLock, tell: Tell, report: Callable[[], None]
    ) -> None:
        self.number, self._delay, self._lock, self._tell, self._report = number, delay, lock, tell, report
        self.read, self._wakes = os.pipe()
        self.write = self.read
        for descriptor in (self.read, self._wakes):
            os.set_blocking(descriptor, False)
        self.began = math.inf
        self._heard = -math.inf
        self._sent = self._answered = 0
        self._answers: deque[bytes] = deque()
        self._invalid = self._closed = self._asked = False
        self._ended: Ended | None = None
        self._lost: str | None = None

    @property
    def calling(self) -> bool:
        """Whether it has not answered a call. The first message only lets it load code."""
        return self._sent > max(1, self._answered)

    @property
    def works(self) -> bool:
        """Whether it has answered a call."""
        return self._answered > 1

    # What the host says. The caller holds the lock.

    def begin(self) -> None:
        """Its host is there."""
        self.began = time.monotonic() + self._delay

    def hear(self, item: Answered | Invalid | Ended) -> None:
        """News of it."""
        if isinstance(item, Answered):
            self._answered += 1
            self._answers.append(item.content)
        elif isinstance(item, Invalid):
            self._invalid = True
        else:
            self._ended = item
        self.wake()

    def heard_until(self, now: float) -> None:
        """All that it said before has been heard."""
        self._heard = now

    def lose(self, why: str) -> None:
        """Its host is lost."""
        self._lost, self.began = why, math.inf
        self.wake()

    def wake(self) -> None:
        """Let whoever waits for it look."""
        if not self._closed:
            with suppress(BlockingIOError):
                os.write(self._wakes, b".")

    # Messages.

    def send(self, message: bytes) -> None:
        """See `Messages`."""
        with self._lock:
            self._sent += 1
            if self._lost is None:
                self._tell("send", self.number, message)

    def flush(self) -> None:
        """See `Messages`. Ray takes a message as a whole."""

    def receive(self) -> bytes | None:
        """See `Messages`."""
        self._report()
        with self._lock:
            with suppress(BlockingIOError):
                os.read(self.read, 4096)
            if self._answers:
                return self._answers.popleft()
            if self._lost is not None:
                raise LostError(self._lost)
            if self._invalid:
                raise ValueError("not a message")
            if self._ended is not None:
                if self._ended.received < self._sent:
                    raise LostError("it had ended before")
                raise EOFError
        return None

    def close(self) -> None:
        """See `Messages`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.read)
                os.close(self._wakes)

    # Process.

    @property
    def gone(self) -> bool:
        """See `Process`."""
        return self._ended is not None or self._lost is not None

    @property
    def heard(self) -> float:
        """See `Process`."""
        with self._lock:
            return -math.inf if self._answers else self._heard

    def ask_to_end(self) -> None:
        """See `Process`."""
        with self._lock:
            if not self._asked and not self.gone:
                self._asked = True
                self._tell("end", self.number)

    def end(self) -> None:
        """See `Process`. The host waits for it."""
        self.ask_to_end()

    def ending(self) -> Ending:
        """See `Process`."""
        assert self._ended is not None
        return self._ended.ending
