"""What a process on another machine says of itself. Neither Ray nor torch is imported."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import psutil

from gruppo.utils.cgroups import available_memory


class Hello(NamedTuple):
    """Who an actor is. `errors`: the file with its standard error, on its own machine; `versions`: of the packages that
    the driver must have too."""

    pid: int
    host: str
    errors: str
    versions: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        return self.host == socket.gethostname()


class Memory(NamedTuple):
    """Bytes that the process holds, and that its machine has left."""

    used: int
    free: int


def greeting(versions: tuple[str, ...]) -> Hello:
    """What this process is."""
    errors = Path("/proc/self/fd/2")
    return Hello(os.getpid(), socket.gethostname(), str(errors.readlink()) if errors.exists() else "", versions)


def own_memory() -> Memory:
    """The memory of this process and its machine."""
    return Memory(psutil.Process().memory_info().rss, available_memory())
