"""Measure how many completions per second a trivial reward scores in the reward processes.

    python benchmarks/rewards.py

Completions have 256 tokens and about 900 characters, in groups of several sizes. At least 10,000 per second are
promised.
"""

from __future__ import annotations

import sys
import time

from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Completion, Prompt

PROMISED = 10_000


def trivial(completions, **columns):
    """A constant reward per completion."""
    return [1.0] * len(completions)


def rate(group_size: int, workers: int, completions: int = 16_384) -> float:
    """Completions per second, best of three."""
    ids, text = tuple(range(1000, 1256)), "The answer is " * 64
    completions_of_group = [Completion(ids, (-1.0,) * len(ids), (True,) * len(ids), "stop", 0, text)] * group_size
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    groups = [
        (Prompt(f"t/{number}", messages, (1, 2, 3), "t", {"answer": "7"}), completions_of_group)
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
    """Print a table; exit with code 1 if a rate is below the promised one."""
    rates = {(size, workers): rate(size, workers) for size in (8, 16, 64) for workers in (1, 2)}
    print("group_size  workers  completions per second")
    for (size, workers), value in rates.items():
        print(f"{size:>10}  {workers:>7}  {value:>22,.0f}")
    sys.exit(min(rates.values()) < PROMISED)


if __name__ == "__main__":
    main()
