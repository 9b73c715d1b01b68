"""Generated addition and subtraction: "What is a + b?" and "What is a - b?", with columns `expression` and `answer`.

The held-out questions are the same for every run and seed. a + b and b + a are one question: both are on the same side
of the split, and the held-out side contains only one of them.
"""

from __future__ import annotations

import random

from gruppo.errors import UsageError
from gruppo.types import Row


def load(split: str, maximum: int = 20, held_out: int = 256, negative: bool = True) -> list[Row]:
    """All questions of one split with numbers from 0 to `maximum`; `negative`: include differences below 0.

    `held_out` questions (a + b and b + a count once), selected with a fixed seed, are the split "test"; all others are
    "train". Raises UsageError if the split is unknown, if an option is out of range, or if a split would be empty.
    """
    if split not in {"train", "test"}:
        raise UsageError(f'split = "{split}": must be "train" or "test"')
    if type(maximum) is not int or not 1 <= maximum <= 1000:
        raise UsageError(f"options.maximum = {maximum!r}: must be a whole number from 1 to 1000; write maximum = 20")
    if not isinstance(negative, bool):
        raise UsageError(f"options.negative = {negative!r}: must be true or false")
    numbers = range(maximum + 1)
    sums = [(a, "+", b) for a in numbers for b in numbers if a <= b]
    differences = [(a, "-", b) for a in numbers for b in numbers if a >= b or negative]
    questions = sums + differences
    if type(held_out) is not int or not 1 <= held_out < len(questions):
        raise UsageError(
            f"options.held_out = {held_out!r}: must be a whole number from 1 to {len(questions) - 1}, as there are "
            f"{len(questions)} questions with maximum = {maximum}; lower it or raise maximum"
        )
    shuffler = random.Random(2402_03300)
    shuffler.shuffle(questions)
    if split == "test":
        return [
            _row(*(question if shuffler.random() < 0.5 else _swapped(*question))) for question in questions[:held_out]
        ]
    train = questions[held_out:]
    train += [_swapped(*question) for question in train if question[1] == "+" and question[0] != question[2]]
    return [_row(*question) for question in train]


def _swapped(a: int, sign: str, b: int) -> tuple[int, str, int]:
    return (b, sign, a) if sign == "+" else (a, sign, b)


def _row(a: int, sign: str, b: int) -> Row:
    answer = a + b if sign == "+" else a - b
    expression = f"{a} {sign} {b}"
    return {
        "prompt": [{"role": "user", "content": f"What is {expression}?"}],
        "expression": expression,
        "answer": str(answer),
    }
