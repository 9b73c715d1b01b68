"""The end of an actor: killing it, and why it has ended."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from gruppo.errors import first_line
from gruppo.utils.actors import Hello, Memory
from gruppo.utils.last_lines import last_lines_of, last_words


def kill_actor(actor: Any, hello: Hello | None) -> None:
    """End the process of an actor, even if it is stopped. A process on this machine ends at once, others within
    seconds."""
    with suppress(RayError):
        ray.kill(actor)
    if hello is not None and hello.is_here:
        with suppress(ProcessLookupError):
            os.kill(hello.pid, signal.SIGKILL)


def why_ended(error: RayError) -> str:
    """Why a task of an actor has failed, in a line."""
    if isinstance(error, RayTaskError):
        return first_line(error.cause) if isinstance(error.cause, Exception) else str(error).strip().splitlines()[-1]
    return _of_ray(str(error)) if isinstance(error, RayActorError) else first_line(error)


def cause_in_words(why: str, hello: Hello | None, memory: Memory | None) -> str:
    """Why an actor has ended, with what it held and wrote last: one line."""
    parts = [why]
    if memory is not None:
        used, free = (size / 1e9 for size in memory)
        parts.append(f"it held {used:.1f} GB when last heard of, and its machine had {free:.1f} GB left")
    if last := _last_words(hello):
        parts.append(f"its last words: {last}")
    return "; ".join(parts)


def _last_words(hello: Hello | None) -> str:
    """What it last wrote to its standard error, if it ran on this machine."""
    if hello is None or not hello.is_here:
        return ""
    return last_words([line for line in last_lines_of(Path(hello.errors)) if not line.startswith(":")])  # ":…": of Ray


def _of_ray(message: str) -> str:
    """What Ray says about the end of a process, without its advice."""
    if "creation task" in message:
        return message.strip().splitlines()[-1]
    for sign, words in (
        ("connection error code", "its process was killed or crashed (Ray does not know the signal)"),
        ("node", "its machine is gone"),
        ("memory", "Ray has killed it, because its machine ran out of memory"),
    ):
        if sign in message:
            return words
    return first_line(Exception(message))
