"""Signs of life: ranks that do not hear from another one say which, and since when.

Every rank counts up in the store of the launcher, once a second, in a thread of its own. The leader looks at all
others, and they look at the leader. So a rank that hangs, or whose machine is gone, is noticed also while nobody
exchanges anything with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from typing import Protocol

from gruppo.utils.system import Memory
from gruppo.utils.waiting import waiting_for

BEAT_SECONDS = 1.0
LATE = 4  # beats until a rank counts as silent


# Says of a rank, in words, that it has ended, and why, or that it is silent: since the given time of day. It is called
# with what the rank last held, too.
EndOf = Callable[[int, Memory | None, str], str]


class Store(Protocol):
    """The part of torch's stores that is used here."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first. Returns the sum."""

    def set(self, key: str, value: str) -> None:
        """Set a text."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of the texts are set."""

    def get(self, key: str) -> bytes:
        """A text that is set."""


class Pulse:
    """The signs of life of this rank, and of those that it looks at: of all others on the leader, else of the leader.

    `size`: number of ranks. `every`: seconds between two signs.
    """

    def __init__(self, store: Store, rank: int, size: int, every: float = BEAT_SECONDS) -> None:
        self.store, self.rank, self.every = store, rank, every
        others = range(1, size) if rank == 0 else range(1)
        self._counts = dict.fromkeys(others, -1)
        self._last = dict.fromkeys(others, time.monotonic())  # when a rank last gave a sign of life

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one to say that others are silent: one follower is enough for a silent leader."""
        return self.rank <= 1

    def beat(self) -> None:
        """Give a sign of life, and look for those of others."""
        self.store.add(f"alive/{self.rank}", 1)
        self.store.set(f"memory/{self.rank}", " ".join(map(str, Memory.now())))
        for other, before in self._counts.items():
            self._counts[other] = self.store.add(f"alive/{other}", 0)
            if self._counts[other] != before:
                self._last[other] = time.monotonic()

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have not given a sign of life for more than some seconds."""
        now = time.monotonic()
        return [other for other, last in self._last.items() if now - last > seconds]

    def leave(self, cause: str) -> None:
        """Say that this rank ends because of an error, in a line, or "" if it only notices the end of another."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", cause)

    def memory(self, rank: int) -> Memory | None:
        """What a rank said of its memory last."""
        text = self._text(f"memory/{rank}")
        return None if text is None else Memory(*map(int, text.split()))

    def account(self, end_of: EndOf | None = None) -> str:
        """Which rank has ended or is silent, and why if it said so, in words; "" if none. Takes a few beats.

        `end_of`: says it of ranks that did not say why.
        """
        time.sleep((LATE + 2) * self.every)
        left = {other: cause for other in self._last if (cause := self._cause(other)) is not None}
        for other, cause in left.items():
            if cause:
                return f"rank {other} has failed ({cause})"
        missing = [other for other in self.silent(LATE * self.every) if other not in left]
        if end_of is not None:
            return "; ".join(end_of(rank, self.memory(rank), self._since([rank])) for rank in missing)
        return self._missing(missing) if missing else ""

    def _cause(self, rank: int) -> str | None:
        """What a rank said as it left; None if it did not."""
        return self._text(f"left/{rank}")

    def _text(self, key: str) -> str | None:
        with suppress(RuntimeError):
            if self.store.check([key]):
                return self.store.get(key).decode()
        return None

    def _awaited(self) -> str:
        return f"a sign of life from {_named(self.silent(LATE * self.every))}"

    def _missing(self, ranks: list[int]) -> str:
        verbs = ("has", "is") if len(ranks) == 1 else ("have", "are")
        return f"{_named(ranks)} {verbs[0]} ended, or {verbs[1]} silent since {self._since(ranks)}"

    def _since(self, ranks: list[int]) -> str:
        """The time of day of the earliest last sign of life."""
        seconds = time.monotonic() - min(self._last[rank] for rank in ranks)
        return f"{datetime.now() - timedelta(seconds=seconds):%H:%M:%S}"

    @contextmanager
    def beating(self, patience: float, lost: Callable[[str], None] | None = None) -> Iterator[None]:
        """Beat until the end of the block, and register the wait for the ranks that are silent.

        `lost`: called in a thread, with words, once a rank is silent for more than `patience` seconds.
        """
        ended = threading.Event()

        def beats() -> None:
            with ExitStack() as stack:
                wait = stack.enter_context(waiting_for(self._awaited)) if self.speaks else None
                while not ended.wait(self.every):
                    with suppress(RuntimeError):  # the store is gone, and the others are silent from now on
                        self.beat()
                    if wait is not None:
                        wait.since = min(self._last.values(), default=time.monotonic())

        def deadline() -> None:
            while lost is not None and not ended.wait(self.every):
                if missing := self.silent(patience):
                    lost(self._missing(missing))
                    return

        self.beat()
        threads = [threading.Thread(target=run, name="pulse", daemon=True) for run in (beats, deadline)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join(10 * self.every)  # not longer: the store may be gone


def _named(ranks: list[int]) -> str:
    if not ranks:
        return "the other ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
