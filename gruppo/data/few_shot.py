"""Worked examples for few-shot prompts (few_shot.json), written for this project; none is from a public dataset."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Example(NamedTuple):
    """A question with the steps to its answer. `choices`: the options of a multiple-choice question."""

    question: str
    working: str
    answer: str
    choices: tuple[str, ...] = ()


@cache
def examples_of(name: str) -> tuple[Example, ...]:
    """Return the examples with this name, such as "word_problems"."""
    content = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(Example(**{**row, "choices": tuple(row.get("choices", ()))}) for row in content[name])
