"""Environments of both kinds, valid and invalid, for tests. They run in their own processes."""

from __future__ import annotations

import asyncio
import os
import random
import time

from gruppo.rollout.environments.protocol import Turn


class Letters:
    """Answers "+" and "--" in turn, ends after `rounds` turns, and rewards the share of letters a to m it received."""

    stop = ("?", "=")

    def __init__(self, rounds: int = 3) -> None:
        self.rounds, self.heard = rounds, []

    def reset(self, row, seed):
        return None

    def step(self, text):
        self.heard.append(text)
        return Turn("+" if len(self.heard) % 2 else "--", done=len(self.heard) >= self.rounds)

    def get_reward(self):
        text = "".join(self.heard)
        return sum("a" <= letter <= "m" for letter in text) / max(1, len(text))


class Silent(Letters):
    """Never answers."""

    def step(self, text):
        self.heard.append(text)
        return Turn()


class Greets:
    """Appends a letter chosen by the seed to the prompt, and answers with the first letter of each turn."""

    def reset(self, row, seed):
        self.letter = "abcdefgh"[seed % 8]
        return self.letter

    def step(self, text):
        return Turn(text[:1])


class Various(Greets):
    """Gives every completion a different first observation."""

    count = 0

    def reset(self, row, seed):
        Various.count += 1
        return "abcdefgh"[Various.count % 8]


class Random:
    """Uses Python's global generator, like classes without a seed."""

    def reset(self, row, seed):
        self.numbers = [random.random()]

    def step(self, text):
        self.numbers.append(random.random())
        return Turn(str(self.numbers))

    def get_reward(self):
        return self.numbers[-1]


class Fails:
    """Fails in the way that the column `what` of the row names."""

    def reset(self, row, seed):
        self.what = row["what"]
        self.act("reset")

    def act(self, where):
        if self.what == f"hang in {where}":
            time.sleep(600)
        if self.what == f"die in {where}":
            os._exit(3)
        if self.what == f"raise in {where}":
            raise ValueError(f"{where} is broken")

    def step(self, text):
        self.act("step")
        if self.what == "no turn":
            return "text"
        if self.what == "no text":
            return Turn(3)
        return Turn("a")

    def get_reward(self):
        self.act("get_reward")
        return {"nan": float("nan"), "none": None, "text": "1"}.get(self.what, 1.0)


class Counter:
    """A TRL environment: a counter with tools."""

    def __init__(self) -> None:
        self.total = 0

    def reset(self, **row) -> str | None:
        self.total = row.get("start", 0)
        return f" It is {self.total} now."

    def add(self, amount: int, times: int = 1) -> str:
        """
        Add to the counter.

        Args:
            amount: What is added,
                each time
            times: How often

        Returns:
            The new total.
        """
        self.total += amount * times
        return f"total {self.total}"

    async def look(self) -> dict:
        """Look at the counter."""
        return {"total": self.total}

    def breaks(self) -> str:
        """Never works."""
        raise RuntimeError("out of order")

    def _hidden(self) -> None:
        raise AssertionError

    def get_reward(self) -> float:
        return float(self.total)


class NoTools:
    def reset(self, **row):
        return None


class NoReset:
    def step(self, text):
        return Turn()


class OtherReset(Letters):
    """Almost a gruppo environment, but with a wrong signature of reset."""

    def reset(self, row):
        return None


class Awaits(Letters):
    """A gruppo environment with an async step."""

    async def step(self, text):
        return Turn("+")


class Locks:
    """A TRL environment with state that is bound to an event loop."""

    async def reset(self, **row):
        self.lock = asyncio.Lock()

    async def hold(self, seconds: float = 0.0) -> str:
        async with self.lock:
            waits = asyncio.create_task(self._wait())
            await asyncio.sleep(seconds)
        return await waits

    async def _wait(self) -> str:
        async with self.lock:
            return "held"

    def get_reward(self) -> float:
        return 1.0
