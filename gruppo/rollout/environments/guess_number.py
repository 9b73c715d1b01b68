"""A game of several turns, as an example: guess a whole number; after each guess you hear where to look.

A task and an environment in one file, as users write them: `task.name = "gruppo.rollout.environments.guess_number:load"` and
`environment.name = "gruppo.rollout.environments.guess_number:Guess"`. See recipes/guess.toml.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from gruppo.rollout.environments.protocol import Turn


def load(split: str, lowest: int = 10, highest: int = 50) -> list[dict[str, Any]]:
    """A row for each range from 1 to `lowest`, …, `highest`; the numbers to guess are drawn when it is played."""
    asked = "I am thinking of a whole number from 1 to {}. Guess it. Answer with one number only."
    return [
        {"prompt": [{"role": "user", "content": asked.format(most)}], "most": most}
        for most in range(lowest, highest + 1)
    ]


class Guess:
    """The number is drawn from 1 to the row's column `most`, the same for a whole group. The reward is 1 for a number
    that was found within `guesses` turns; else half of how near the nearest guess was, 0 to 0.5, and 0 for no guess in
    the range at all."""

    def __init__(self, guesses: int = 4) -> None:
        self.guesses = guesses

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Draw the number."""
        self.most = int(row["most"])
        self.number = random.Random(seed).randint(1, self.most)
        self.made: list[int] = []
        self.turns = 0
        return None

    def step(self, text: str) -> Turn:
        """Hear the first number of a text as a guess."""
        self.turns += 1
        found = re.search(r"\d+", text)
        guess = int(found[0][:9]) if found else 0
        if not 1 <= guess <= self.most:
            return Turn(f"That is no number from 1 to {self.most}.", done=self.turns == self.guesses)
        self.made.append(guess)
        told = "Right." if guess == self.number else "Higher." if guess < self.number else "Lower."
        return Turn(told, done=guess == self.number or self.turns == self.guesses)

    def get_reward(self) -> float:
        """See the top of the class."""
        if not self.made:
            return 0.0
        apart = min(abs(guess - self.number) for guess in self.made)
        return 1.0 if not apart else 0.5 * (1 - apart / self.most)
