"""How many completions a second a trivial reward is called for, through the processes that rewards run in.

    python benchmarks/rewards.py

Completions are of 256 tokens and 900 letters, in groups of several sizes; at least 10,000 a second is promised.
"""

from __future__ import annotations

import sys
import time

from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Completion, Prompt

PROMISED = 10_000


def trivial(completions, **columns):
    """A number for each completion, without looking at it."""
    return [1.0] * len(completions)


def rate(group_size: int, workers: int, completions: int = 16_384) -> float:
    """Completions a second, the best of three."""
    ids, text = tuple(range(1000, 1256)), "The answer is " * 64
    own = [Completion(ids, (-1.0,) * len(ids), (True,) * len(ids), "stop", 0, text)] * group_size
    asked = [{"role": "user", "content": "What is 3 + 4?"}]
    groups = [
        (Prompt(f"t/{number}", asked, (1, 2, 3), "t", {"answer": "7"}), own)
        for number in range(completions // group_size)
    ]
    best = 0.0
    with RewardPool([trivial], [], ["answer"], workers=workers) as pool:
        for _ in range(3):
            start = time.perf_counter()
            pool.score(groups, {})
            best = max(best, len(groups) * group_size / (time.perf_counter() - start))
    return best


def main() -> None:
    """Print a table; exit code 1 where a rate is below what is promised."""
    rates = {(size, workers): rate(size, workers) for size in (8, 16, 64) for workers in (1, 2)}
    print("group_size  workers  completions a second")
    for (size, workers), found in rates.items():
        print(f"{size:>10}  {workers:>7}  {found:>20,.0f}")
    sys.exit(min(rates.values()) < PROMISED)


if __name__ == "__main__":
    main()
