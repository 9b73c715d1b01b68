"""The work of the readers grows linearly with the length of a text: operations are counted, not seconds."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gruppo.data import boxes
from gruppo.rewards.grading import extraction, last_number, latex, math_verify, numbers, quantities
from tests.rewards.grading.counting import Counter, TooManySteps

PARTS = (
    "9", "1,", "1,234,", "11,", " 111", "1 ", "1/", "1.", "1e1", "1-", "1 : ", "$", "$1", "$$", "\\(", "\\[", "{", "}", "(", "(aa",
    "[", " ", "\n", "\t \n", ",", ".", "*", "_", "-", "#", ">", "^", "\\", "\\boxed{", "\\boxed{1}", "\\boxed{1} ", "\\frac",
    "\\frac1", "\\sqrt", "\\text{", "<answer>", "</answer>", "a", "aa ", "final ", "Final answer", "answer ", "the answer ",
    "answer is ", "answer is \\[", "Answer: x = ", "no, ", "wait, let me check ", "one ", "one-", "hundred ", "\nQuestion: ",
    "\n# answer", "####", "九", "百分之", "1元", "that is ", "Answer:\n", "is ", "1 and ", "=", "½", "⁹", "5 km",
)  # fmt: skip
# Patterns that see a bounded part of a text only: a decision, a sentence, the characters around a number.
BOUNDED = {"_ABOUT", "_OR", "_UNKNOWN", "_BETWEEN", "_BOUND", "_BOUNDED", "_WORKED_OUT", "_SPECIFIED", "_DENIED", "_POWER",
           "_SUPPOSED", "_WRONG", "_PART", "_LIST", "_LIST_MARK"}  # fmt: skip


def patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    for module in (boxes, extraction, last_number, latex, math_verify, numbers, quantities):
        for name, value in vars(module).items():
            found = value if isinstance(value, list) else [value]
            for place, item in enumerate(found):
                pattern = item[0] if isinstance(item, tuple) and item else item
                if isinstance(pattern, re.Pattern) and name not in BOUNDED:
                    yield f"{module.__name__.rpartition('.')[2]}.{name}[{place}]", pattern


def deep(work: Any) -> Any:
    """Run with a deep stack."""
    results: list[Any] = []
    size, limit = threading.stack_size(512 * 2**20), sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
        sys.setrecursionlimit(limit)
    return results[0]


SHORT, LONG = 60, 240


def grows(pattern: re.Pattern[str], part: str) -> bool:
    """Whether a text four times as long takes more than seven times the steps."""
    try:
        steps = Counter(pattern, (part * SHORT)[:SHORT], 20_000).search_all()
        Counter(pattern, (part * LONG)[:LONG], 7 * steps + 2000).search_all()
    except TooManySteps:
        return True
    return False


@pytest.mark.parametrize(("name", "pattern"), list(patterns()), ids=[name for name, _ in patterns()])
def test_patterns_take_linear_steps(name: str, pattern: re.Pattern[str]) -> None:
    assert deep(lambda: [part for part in PARTS if grows(pattern, part)]) == []
