"""The work of the readers grows linearly with the length of a text: operations are counted, not seconds."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from gruppo.data import boxes, options
from gruppo.rewards.grading import (
    choices,
    extraction,
    last_number,
    latex,
    math_verify,
    numbers,
    quantities,
    weighing,
)
from tests.rewards.grading.counting import Counter, TooManyStepsError

PARTS = (
    "9", "1,", "111,", "11,", " 111", "1/", "1e1", "1 : ", "$1", "\\(", "\\[", "{", "(aa", " ", "\n", ".", "*", "#",
    "\\boxed{", "\\boxed{1} ", "\\frac1", "\\text{", "<answer>", "a", "final ", "answer ", "answer is \\[",
    "one ", "1元",
)  # fmt: skip
# Parts of texts that choose options.
CHOOSING = (
    " ", "\n", "\t", "\u00a0", "*", "$", "A", "A ", "(", "(A) ", "A. ", "A)\n", "b\n", "answer is ", "answer is A",
    "option ",
    "选", "so ", "right ", "> ", "B, ", "is the ", "not ", "不是A", "\"", "A) is correct ", "\\text",
)  # fmt: skip
# Patterns that see a bounded part of a text only: a decision, a sentence, the characters around a number.
BOUNDED = {"_ABOUT", "_OR", "_UNKNOWN", "_BETWEEN", "_BOUND", "_BOUNDED", "_WORKED_OUT", "_SPECIFIED", "_DENIED",
           "_POWER", "_SUPPOSED", "_WRONG", "_PART", "_LIST", "_LIST_MARK", "_REVISED", "NO_BEFORE", "_OPEN_BEFORE",
           "_YES_BEFORE", "_BEGINS", "_IF_BEFORE", "_NOT_CHOSEN", "_NOT_THOUGHT"}  # fmt: skip
# Patterns that are tried at one place of a text, not searched for.
ANCHORED = {"_AFTER", "_NEGATED", "_NUMBERED", "_TOKEN", "_INDEX", "_RAISED", "LABELLED", "_ARTICLE", "_ALONE",
            "_FIRST", "_ONLY", "_OR_ELSE", "_RETRACTED", "_REFUSED", "_NO_AFTER",
            "_OF_THE_NEXT", "_YES_AFTER", "_ALL_AFTER"}  # fmt: skip


NUMBERS = (boxes, extraction, last_number, latex, math_verify, numbers, quantities)
CHOICES = (options, choices, weighing)


def patterns(modules: Sequence[ModuleType]) -> Iterator[tuple[str, re.Pattern[str]]]:
    for module in modules:
        for name, value in vars(module).items():
            found = value if isinstance(value, list) else [value]
            for place, item in enumerate(found):
                pattern = item[0] if isinstance(item, tuple) and item else item
                pattern = pattern.all if isinstance(pattern, options.Lettered) else pattern
                if isinstance(pattern, re.Pattern) and name not in (*BOUNDED, "_FOREIGN"):
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


def grows(pattern: re.Pattern[str], part: str, start: str = "", anchored: bool = False) -> bool:
    """Whether a text four times as long takes more than nine times the steps (quadratic work: sixteen times).

    The text is `part`, repeated after `start`. `anchored`: the pattern is tried at the beginning only.
    """
    count = Counter.match if anchored else Counter.search_all
    try:
        steps = count(Counter(pattern, (start + part * SHORT)[:SHORT], 50_000))
        count(Counter(pattern, (start + part * LONG)[:LONG], 9 * steps + 1000))
    except TooManyStepsError:
        return True
    return False


def grown(modules: Sequence[ModuleType], parts: Sequence[str], starts: Sequence[str] = ("",)) -> list[tuple[str, ...]]:
    tried = [(name, pattern, start, part) for name, pattern in patterns(modules) for start in starts for part in parts]
    return [
        (name, start, part)
        for name, pattern, start, part in tried
        if grows(pattern, part, start, name.partition(".")[2].partition("[")[0] in ANCHORED)
    ]


def test_patterns_take_linear_steps() -> None:
    assert deep(lambda: grown(NUMBERS, PARTS)) == []


def test_patterns_of_choices_take_linear_steps() -> None:
    assert deep(lambda: grown(CHOICES, CHOOSING)) == []
    assert deep(lambda: grown(CHOICES, (" ", "\n", "*"), ("A", "The answer is", "so A is not"))) == []


def test_phrases_of_other_languages_take_linear_steps() -> None:
    found = deep(
        lambda: [
            (foreign.phrase.all.pattern, part)
            for foreign in choices._FOREIGN
            for part in (" ", "A ")
            if grows(foreign.phrase.all, part)
        ]
    )
    assert found == []


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


def chosen(text: str) -> object:
    return choices.grade_choice(text, "B", {"choices": ["4", "resonance", "6 cm", "x^2"]})


@pytest.mark.parametrize("read", [chosen, options.split_options, options.bare_words, options.unlabelled])
@pytest.mark.parametrize("part", ["\n", " ", "B\n", "A. is right\n", "(A) ", "the answer is B. ", "\\boxed{B} ", "B, "])
def test_readers_of_choices_make_a_linear_number_of_calls(read: Callable[[str], object], part: str) -> None:
    read(part * 10)  # compiles and caches
    counts = [calls(read, (part * size)[:size]) for size in (1_000, 10_000)]
    assert counts[1] <= 15 * counts[0] + 500
