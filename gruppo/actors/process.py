"""What a process of Ray says of itself, and why one has ended: in a line."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from gruppo import __version__
from gruppo.errors import RunError, first_line
from gruppo.utils.cgroups import Memory
from gruppo.utils.last_lines import last_lines_of, last_words


class Hello(NamedTuple):
    """Who a process is. `errors`: the file with its standard error, on its own machine. `versions`: see `versions`."""

    pid: int
    host: str
    errors: str
    versions: tuple[str, str]

    @classmethod
    def of_this_process(cls) -> Hello:
        """That of the process that calls this."""
        errors = Path("/proc/self/fd/2")
        return cls(os.getpid(), socket.gethostname(), str(errors.readlink()) if errors.exists() else "", versions())

    def __str__(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether the process is on this machine."""
        return self.host == socket.gethostname()

    def last_words(self) -> str:
        """What the process last wrote to its standard error, if it is on this machine."""
        if not self.is_here:
            return ""
        return last_words(
            [line for line in last_lines_of(Path(self.errors)) if not line.startswith(":")]
        )  # ":…": of Ray


def versions() -> tuple[str, str]:
    """Of gruppo and torch. All processes of a run must agree."""
    return __version__, metadata.version("torch")


def require_same_versions(hello: Hello, field: str) -> None:
    """Raise RunError if a process has another gruppo or torch than this one. `field`: what has started it."""
    if hello.versions != versions():
        theirs, ours = (f"gruppo {gruppo} with torch {torch_}" for gruppo, torch_ in (hello.versions, versions()))
        raise RunError(f"{field}: {hello.host} has {theirs}, and this process {ours}; install the same on all machines")


def end_process(actor: Any, hello: Hello | None) -> None:
    """End an actor's process, even if it is stopped. A process on this machine ends at once, others within seconds."""
    with suppress(RayError):
        ray.kill(actor)
    if hello is not None and hello.is_here:
        with suppress(ProcessLookupError):
            os.kill(hello.pid, signal.SIGKILL)


def cause_of_end(why: str | RayError, hello: Hello | None, memory: Memory | None) -> str:
    """Why a process has ended: in a line, with what it last wrote and held. `why`: what it said itself, or what Ray
    says."""
    parts = [why if isinstance(why, str) else _words(why)]
    if memory is not None:
        used, free = (size / 1e9 for size in memory)
        parts.append(f"it held {used:.1f} GB when last heard of, and its machine had {free:.1f} GB left")
    if hello is not None and (last := hello.last_words()):
        parts.append(f"its last words: {last}")
    return "; ".join(parts)


def _words(error: RayError) -> str:
    if isinstance(error, RayTaskError):
        return first_line(error.cause) if isinstance(error.cause, Exception) else str(error).strip().splitlines()[-1]
    return _of_ray(str(error)) if isinstance(error, RayActorError) else first_line(error)


def _of_ray(message: str) -> str:
    """What Ray says about the end of a process, without its advice."""
    if "creation task" in message:
        return message.strip().splitlines()[-1]
    for sign, words in (
        ("connection error code", "its process was killed or crashed (Ray does not know the signal)"),
        ("unavailable", "it cannot be reached: its process or its machine is gone, or hangs"),
        ("node", "its machine is gone"),
        ("memory", "Ray has killed it, because its machine ran out of memory"),
    ):
        if sign in message:
            return words
    return first_line(Exception(message))
