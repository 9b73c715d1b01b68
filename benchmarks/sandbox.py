"""Measure how long a block of model-written code takes in the sandbox: first blocks, later blocks, cold starts.

    python benchmarks/sandbox.py

A median of at most 50 ms per block is promised, both for first blocks with a ready interpreter and for later blocks.
"""

from __future__ import annotations

import statistics
import sys
import time

from gruppo.rollout.sandbox import Limits, PythonPool
from gruppo.rollout.sandbox.bubblewrap import find_bubblewrap
from gruppo.rollout.sandbox.interpreter import Process

PROMISED = 0.05
CODE = "sum(range(10))"


def timed(session) -> float:
    """Seconds that one block takes."""
    start = time.perf_counter()
    assert session.run(CODE).output == "45\n"
    return time.perf_counter() - start


def blocks(sessions: int, pause: float) -> tuple[list[float], list[float]]:
    """Seconds of the first block and of the nine later blocks of every session, with a pause between sessions."""
    first, later = [], []
    with PythonPool(Limits()) as pool:
        time.sleep(1)
        for _ in range(sessions):
            with pool.session() as session:
                first.append(timed(session))
                later += [timed(session) for _ in range(9)]
            time.sleep(pause)
    return first, later


def cold(number: int) -> list[float]:
    """Seconds from process start to the end of the first block."""
    bubblewrap, seconds = find_bubblewrap(), []
    for _ in range(number):
        start = time.perf_counter()
        process = Process(Limits(), bubblewrap, "benchmark")
        process.await_ready()
        process.run(CODE.encode(), "")
        seconds.append(time.perf_counter() - start)
        process.close()
    return seconds


def main() -> None:
    """Print a table; exit with code 1 if a median is above the promised one."""
    first, later = blocks(50, 0.1)
    without_pause, _ = blocks(50, 0)
    rows = {
        "first block, ready interpreter": first,
        "first block, sessions without a pause": without_pause,
        "later block": later,
        "first block, cold start": cold(20),
    }
    print(f"{'':40}{'median ms':>10}{'worst ms':>10}{'number':>8}")
    for name, seconds in rows.items():
        print(f"{name:40}{1000 * statistics.median(seconds):>10.1f}{1000 * max(seconds):>10.1f}{len(seconds):>8}")
    sys.exit(max(statistics.median(first), statistics.median(later)) > PROMISED)


if __name__ == "__main__":
    main()
