"""Sums of several numbers, with the solution step by step: the task of studies/methods.toml and iterations.toml.

`name = "chains.py:load"`. A question is a sum and difference of `terms` numbers, computed from the left:

    What is 7 + 15 - 3 + 8? Add or subtract one number per line.

and its solution has one line per operation: `7 + 15 = 22`, `22 - 3 = 19`, `19 + 8 = 27`. A wrong line makes all later
lines wrong, which is what process supervision is about.
"""

from __future__ import annotations

import random

TEST_QUESTIONS = 500
SEARCH_QUESTIONS = 500
TRAINING_QUESTIONS = 6000


def load(split: str, terms: int = 4, maximum: int = 30, search: bool = False) -> list[dict[str, object]]:
    """Rows with `prompt`, `solution` and `answer`. No question of "test" is in "train".

    terms: numbers in a question, at least 2. maximum: numbers are 1 to this; intermediate results are never negative.
    search: to choose settings. "test" is then 500 of the training questions, and "train" the others; the questions of
    the real "test" are in neither. All rows are the same on every machine.
    """
    source = random.Random(f"chains {terms} {maximum}")
    questions: dict[str, dict[str, object]] = {}
    while len(questions) < TEST_QUESTIONS + TRAINING_QUESTIONS:
        row = _row(source, terms, maximum)
        questions.setdefault(str(row["prompt"]), row)
    rows = list(questions.values())
    tested, training = rows[:TEST_QUESTIONS], rows[TEST_QUESTIONS:]
    if search:
        tested, training = training[:SEARCH_QUESTIONS], training[SEARCH_QUESTIONS:]
    return tested if split == "test" else training


def _row(source: random.Random, terms: int, maximum: int) -> dict[str, object]:
    total = source.randint(1, maximum)
    expression, lines = str(total), []
    for _ in range(terms - 1):
        number = source.randint(1, maximum)
        sign = "-" if number <= total and source.random() < 0.5 else "+"
        result = total + number if sign == "+" else total - number
        lines.append(f"{total} {sign} {number} = {result}")
        expression, total = f"{expression} {sign} {number}", result
    prompt = f"What is {expression}? Add or subtract one number per line."
    return {"prompt": prompt, "solution": "\n".join(lines), "answer": total}
