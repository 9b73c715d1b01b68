"""An example of a game of several turns: guess a whole number, with a hint after each guess.

A task and an environment in one file, as users write them:

    task.name = "gruppo.rollout.environments.guess_number:load"
    environment.name = "gruppo.rollout.environments.guess_number:Guess"

See the recipe `guess`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from gruppo.rollout.environments.protocol import Turn


def load(split: str, lowest: int = 10, highest: int = 50) -> list[dict[str, Any]]:
    """One row per range from 1 to n, for n from `lowest` to `highest`. The number to guess is sampled at reset."""
    question = "I am thinking of a whole number from 1 to {}. Guess it. Answer with one number only."
    return [
        {"prompt": [{"role": "user", "content": question.format(most)}], "most": most}
        for most in range(lowest, highest + 1)
    ]


class Guess:
    """The guessing game. The number is sampled from 1 to the row's column `most`, the same for a whole group.

    The reward is 1 if the number is guessed within `guesses` turns. Otherwise it is 0.5 · (1 - distance / `most`) for
    the nearest guess, or 0 without a guess in the range.
    """

    def __init__(self, guesses: int = 4) -> None:
        self.guesses = guesses

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Sample the number."""
        self.most = int(row["most"])
        self.number = random.Random(seed).randint(1, self.most)
        self.numbers: list[int] = []  # guesses in the range
        self.turns = 0
        return None

    def step(self, text: str) -> Turn:
        """Take the first number in the text as a guess."""
        self.turns += 1
        match = re.search(r"\d+", text)
        guess = int(match[0][:9]) if match else 0
        if not 1 <= guess <= self.most:
            return Turn(f"That is no number from 1 to {self.most}.", done=self.turns == self.guesses)
        self.numbers.append(guess)
        hint = "Right." if guess == self.number else "Higher." if guess < self.number else "Lower."
        return Turn(hint, done=guess == self.number or self.turns == self.guesses)

    def get_reward(self) -> float:
        """See the class docstring."""
        if not self.numbers:
            return 0.0
        distance = min(abs(guess - self.number) for guess in self.numbers)
        return 1.0 if not distance else 0.5 * (1 - distance / self.most)
