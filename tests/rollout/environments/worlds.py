"""Environments of both kinds, good and bad, for tests. They run in processes of their own."""

from __future__ import annotations

import asyncio
import os
import random
import time

from gruppo.rollout.environments.protocol import Turn


class Letters:
    """Says "+" after each turn, and is over after `rounds` of them; rewards the letters a to m that it was given."""

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


class NullProgress(Letters):
    """Never says a thing."""

    def step(self, text):
        self.heard.append(text)
        return Turn()


class Greets:
    """Ends the prompt with a letter of its seed, and repeats what it hears."""

    def reset(self, row, seed):
        self.letter = "abcdefgh"[seed % 8]
        return self.letter

    def step(self, text):
        return Turn(text[:1])


class Various(Greets):
    """Says something else to every completion."""

    count = 0

    def reset(self, row, seed):
        Various.count += 1
        return "abcdefgh"[Various.count % 8]


class Random:
    """Draws from Python's own generator, as classes without a seed do."""

    def reset(self, row, seed):
        self.drawn = [random.random()]

    def step(self, text):
        self.drawn.append(random.random())
        return Turn(str(self.drawn))

    def get_reward(self):
        return self.drawn[-1]


class Fails:
    """What the row's column `what` says."""

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
    """One of TRL's: a counter with tools."""

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
    """Meant as one of ours, and nearly so."""

    def reset(self, row):
        return None


class Awaits(Letters):
    """Ours, but not at once."""

    async def step(self, text):
        return Turn("+")


class Locks:
    """A class of TRL's that keeps what belongs to an event loop."""

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
