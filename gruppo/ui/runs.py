"""The runs that a server shows: each one is opened once, and followed from then on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from gruppo.ui.live import LiveRun

MOST_OPEN = 24  # runs that are kept in memory


class OpenRuns:
    """The `LiveRun`s of run folders; the ones that were asked for longest ago are closed. Safe for several threads."""

    def __init__(self, most: int = MOST_OPEN) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._live: OrderedDict[Path, LiveRun] = OrderedDict()

    def live(self, path: Path) -> LiveRun:
        """The metrics and events of a run, up to date."""
        with self._lock:
            found = self._live.pop(path, None) or LiveRun(path)
            self._live[path] = found
            while len(self._live) > self.most:
                self._live.popitem(last=False)
        found.poll()
        return found
