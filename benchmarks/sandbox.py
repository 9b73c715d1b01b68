"""How long a block of model-written code waits for its sandbox: first blocks of sessions, later ones, cold starts.

    python benchmarks/sandbox.py

At most 50 ms is promised for a block, in the median of first blocks that find a ready interpreter and of later blocks.
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
    """Seconds of one block."""
    start = time.perf_counter()
    assert session.run(CODE).output == "45\n"
    return time.perf_counter() - start


def blocks(sessions: int, pause: float) -> tuple[list[float], list[float]]:
    """Seconds of sessions' first blocks and of their nine later ones, with a pause between sessions."""
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
    """Seconds from nothing to the end of a first block."""
    bubblewrap, made = find_bubblewrap(), []
    for _ in range(number):
        start = time.perf_counter()
        process = Process(Limits(), bubblewrap, "benchmark")
        process.await_ready()
        process.run(CODE.encode(), "")
        made.append(time.perf_counter() - start)
        process.close()
    return made


def main() -> None:
    """Print a table; exit code 1 where a median is above what is promised."""
    first, later = blocks(50, 0.1)
    hurried, _ = blocks(50, 0)
    rows = {
        "first block, ready interpreter": first,
        "first block, sessions without a pause": hurried,
        "later block": later,
        "first block, cold start": cold(20),
    }
    print(f"{'':40}{'median ms':>10}{'worst ms':>10}{'number':>8}")
    for name, found in rows.items():
        print(f"{name:40}{1000 * statistics.median(found):>10.1f}{1000 * max(found):>10.1f}{len(found):>8}")
    sys.exit(max(statistics.median(first), statistics.median(later)) > PROMISED)


if __name__ == "__main__":
    main()
