"""A process that outlives the trainer briefly, to kill the remaining processes of its sandboxes.

bubblewrap ends with the process that started it, except for an instant during its start: if the trainer is killed then,
a process is left that waits forever. This program waits for the trainer to end, then kills all processes with the mark
of the pool on their command lines. It uses only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

AGAIN_SECONDS = 0.2  # until the next search, for processes that had not started yet


def marked(mark: bytes) -> list[int]:
    """Ids of the processes, except this one, that have the mark on their command lines."""
    processes = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as stream:
            if mark in stream.read():
                processes.append(int(name))
    return processes


def end(mark: bytes) -> int:
    """Kill the marked processes. Returns their number."""
    processes = marked(mark)
    for number in processes:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)
    return len(processes)


def main() -> None:
    """Wait for the trainer to end, then kill the marked processes.

    Arguments: the descriptor of a pipe from the trainer, and the mark. A byte in the pipe means that the pool was
    closed normally, so that a single search is enough.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
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
