"""A process that outlives the trainer by a moment, to kill what is left of its sandboxes.

bubblewrap ends with the process that started it, but for an instant while it starts: killed then, it leaves a process
that waits for ever. This program waits for the trainer to end, then kills all that carry the mark of its pool on their
command lines. It has the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

AGAIN_SECONDS = 0.2  # what had not even begun at the first look


def marked(mark: bytes) -> list[int]:
    """The processes, but this one, that have the mark on their command lines."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as stream:
            if mark in stream.read():
                found.append(int(name))
    return found


def end(mark: bytes) -> int:
    """Kill them; how many there were."""
    found = marked(mark)
    for number in found:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)
    return len(found)


def main() -> None:
    """Arguments: the descriptor of a pipe from the trainer, and the mark. A byte in the pipe says that the pool is
    closed in good order, and that one look is enough."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    mark = sys.argv[2].encode()
    if os.read(int(sys.argv[1]), 1):
        end(mark)
        return
    quiet = 0
    while quiet < 2:
        quiet = 0 if end(mark) else quiet + 1
        time.sleep(AGAIN_SECONDS)


if __name__ == "__main__":
    main()
