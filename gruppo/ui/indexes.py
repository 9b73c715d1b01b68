"""The indexes of the runs that are looked at: opened on demand, brought up to date in the background, closed again."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from pathlib import Path

from gruppo.errors import RunError
from gruppo.ui.index import Index

MOST_OPEN = 3  # indexes in memory, each with at most 128 MB
WAIT_SECONDS = 0.3  # for an update, before a page is shown without it
FRESH_SECONDS = 0.25  # an index is not brought up to date more often
FOLLOW_SECONDS = 10.0  # that a part of a page which follows the run waits for all tables that are there


def default_cache() -> Path:
    """Where indexes are kept: XDG_CACHE_HOME/gruppo/ui, by default in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "gruppo" / "ui"


class NotReadyError(Exception):
    """The index of a run is being built for the first time. `done` of `total` tables are in it; total 0: not known."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"{done} of {total} tables")
        self.done, self.total = done, total


@dataclass
class _Entry:
    index: Index
    update: Future[None] | None = None
    ready: bool = False
    began: float = 0.0  # when the last update did
    done: tuple[int, int] = (0, 0)
    problem: RunError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Indexes:
    """The indexes of several runs. Safe for several threads. `cache`: see `Index`."""

    def __init__(self, cache: Path, most: int = MOST_OPEN) -> None:
        self.cache, self.most = cache, most
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, _Entry] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="index")

    def of(self, run: Path, wait: float = WAIT_SECONDS, fresh: float = FRESH_SECONDS) -> Index:
        """The index of a run as it was at most `fresh` seconds ago, unless that takes longer than `wait` seconds.

        Raises NotReadyError as long as it is built for the first time, and RunError if it cannot be written anywhere.
        """
        entry, now = self._entry(run), time.monotonic()
        for _ in range(2):  # an update that was going on may have missed the newest table
            update = self._needed(entry, now - fresh)
            if update is None:
                break
            try:
                update.result(timeout=max(0.0, now + wait - time.monotonic()))
            except NotYet:
                break
            if entry.problem is not None:
                break
        if entry.problem is not None:
            raise entry.problem
        if not entry.ready:
            raise NotReadyError(*entry.done)
        return entry.index

    def progress(self, run: Path) -> tuple[bool, int, int]:
        """Whether the index of a run is ready; if not, how many of its tables are done, and of how many."""
        try:
            self.of(run, wait=0)
        except NotReadyError as error:
            return False, error.done, error.total
        return True, 0, 0

    def close(self) -> None:
        """Close all indexes."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), OrderedDict()
        for entry in entries:
            entry.index.close()
        self._threads.shutdown(cancel_futures=True)

    def _entry(self, run: Path) -> _Entry:
        with self._lock:
            entry = self._entries.pop(run, None) or _Entry(Index(run, self.cache))
            self._entries[run] = entry
            while len(self._entries) > self.most:  # closed before the run can be opened again, which needs its lock
                self._entries.popitem(last=False)[1].index.close()
            return entry

    def _needed(self, entry: _Entry, oldest: float) -> Future[None] | None:
        """An update that is going on or has to be begun; None if the last one began after `oldest`."""
        with entry.lock:
            if entry.update is None and (not entry.ready or entry.began < oldest):
                entry.update = self._threads.submit(self._update, entry)
            return entry.update

    @staticmethod
    def _update(entry: _Entry) -> None:
        def progress(done: int, total: int) -> None:
            entry.done = (done, total)

        entry.began = time.monotonic()
        try:
            entry.index.update(progress)
            entry.ready, entry.problem = True, None
        except RunError as error:
            entry.problem = error
        finally:
            with entry.lock:
                entry.update = None
