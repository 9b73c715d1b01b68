"""The work of the readers grows linearly with the length of a text: operations are counted, not seconds."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gruppo.data import boxes
from gruppo.rewards.grading import extraction, last_number, latex, math_verify, numbers, quantities, terms
from tests.rewards.grading.counting import Counter, TooManyStepsError

PARTS = (
    "9", "1,", "111,", "11,", " 111", "1/", "1e1", "1 : ", "$1", "\\(", "\\[", "{", "(aa", " ", "\n", ".", "*", "#",
    "\\boxed{", "\\boxed{1} ", "\\frac1", "\\text{", "<answer>", "a", "final ", "answer ", "answer is \\[",
    "one ", "1元",
)  # fmt: skip
# Patterns that see a bounded part of a text only: a decision, a sentence, the characters around a number.
BOUNDED = {"_ABOUT", "_OR", "_UNKNOWN", "_BETWEEN", "_BOUND", "_WORKED_OUT", "_SPECIFIED", "_DENIED",
           "_POWER", "_SUPPOSED", "_WRONG", "_PART", "_LIST", "_LIST_MARK", "_REVISED"}  # fmt: skip
# Patterns that are tried at one place of a text, not searched for.
ANCHORED = {"_AFTER", "_NEGATED", "_NUMBERED", "_TOKEN", "_INDEX", "_RAISED", "_BEFORE", "_NUMBER_BEFORE", "_ARTICLE",
            "_FACTOR", "_PER", "_MATRIX", "_UNIT_NOUN"}  # fmt: skip


def patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    for module in (boxes, extraction, last_number, latex, math_verify, numbers, quantities, terms):
        for name, value in vars(module).items():
            found = value if isinstance(value, list) else [value]
            for place, item in enumerate(found):
                pattern = item[0] if isinstance(item, tuple) and item else item
                if isinstance(pattern, re.Pattern) and name not in BOUNDED | ANCHORED:
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
    """Whether a text four times as long takes more than nine times the steps (quadratic work: sixteen times)."""
    try:
        steps = Counter(pattern, (part * SHORT)[:SHORT], 20_000).search_all()
        Counter(pattern, (part * LONG)[:LONG], 9 * steps + 1000).search_all()
    except TooManyStepsError:
        return True
    return False


def test_patterns_take_linear_steps() -> None:
    assert deep(lambda: [(name, part) for name, pattern in patterns() for part in PARTS if grows(pattern, part)]) == []


def calls(read: Callable[[str], object], text: str) -> int:
    """Calls of Python and C functions while a text is read."""
    count = 0

    def event(frame: object, kind: str, argument: object) -> None:
        nonlocal count
        count += kind in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(event)
    try:
        read(text)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("read", [last_number.last_number, boxes.last_box, latex.formulas, latex.braced,
                                  extraction.own_answer, extraction.decisions, numbers.answered_number])  # fmt: skip
@pytest.mark.parametrize(
    "part", ["9", " ", "{", "\\boxed{1} ", "\\boxed{", "$1$ ", "1,234,", "answer is 1, ", "(1 aa) "]
)
def test_readers_make_a_linear_number_of_calls(read: Callable[[str], object], part: str) -> None:
    read(part * 10)  # compiles and caches
    counts = [calls(read, (part * size)[:size]) for size in (1_000, 10_000, 100_000)]
    assert counts[1] <= 15 * counts[0] + 500
    assert counts[2] <= 15 * counts[1] + 500
