"""The work of the readers grows linearly with the length of a text: operations are counted, not seconds."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from gruppo.data import boxes, options
from gruppo.rewards.answers import MathVerify
from gruppo.rewards.grading import (
    choices,
    conditions,
    extraction,
    last_number,
    latex,
    math_verify,
    matrices,
    numbers,
    parsing_work,
    quantities,
    terms,
    units,
    weighing,
)
from gruppo.rewards.grading.graders import find_grader
from tests.rewards.grading.counting import Counter, TooManyStepsError

PARTS = (
    "9", "1,", "111,", "11,", " 111", "1/", "1e1", "1 : ", "$1", "\\(", "\\[", "{", "(aa", " ", "\n", ".", "*", "#",
    "\\boxed{", "\\boxed{1} ", "\\frac1", "\\text{", "<answer>", "a", "final ", "answer ", "answer is \\[",
    "one ", "1元",
)  # fmt: skip
# Parts of texts that choose options.
CHOOSING = (
    " ", "\n", "\t", "\u00a0", "*", "$", "A", "A ", "(", "(A) ", "A. ", "A)\n", "b\n", "answer is ", "answer is A",
    "option ", "would ", "if ", "…",
    "选", "so ", "right ", "> ", "B, ", "is the ", "not ", "不是A", "\"", "A) is correct ", "\\text",
)  # fmt: skip
# Patterns that see a bounded part of a text only: a decision, a sentence, the characters around a number.
BOUNDED = {"_ABOUT", "_OR", "_UNKNOWN", "_BETWEEN", "_BOUND", "_BOUNDED", "_WORKED_OUT", "_SPECIFIED", "_DENIED",
           "_POWER", "_SUPPOSED", "_WRONG", "_PART", "_LIST", "_LIST_MARK", "_LISTS", "_REVISED", "NO_BEFORE",
           "_OPEN_BEFORE", "_YES_BEFORE", "_BEGINS", "_IF_BEFORE", "_NOT_CHOSEN", "_NOT_THOUGHT"}  # fmt: skip
# Patterns that are tried at one place of a text, not searched for.
ANCHORED = {"_AFTER", "_NEGATED", "_NUMBERED", "_TOKEN", "_INDEX", "_RAISED", "LABELLED", "_ARTICLE", "_ALONE",
            "_FIRST", "_ONLY", "_OR_ELSE", "_RETRACTED", "_REFUSED", "_NO_AFTER", "_OF_THE_NEXT", "_YES_AFTER",
            "_ALL_AFTER", "_FRACTION", "_UPRIGHT_LETTER", "_BUILDER", "_MEMBER", "_UNIT_VECTOR", "_BEFORE",
            "_NUMBER_BEFORE", "_FACTOR", "_PER", "_MATRIX", "_UNIT_NOUN", "_LETTERS_ONLY", "_IF_AFTER",
            "_WOULD_AFTER"}  # fmt: skip


NUMBERS = (
    boxes, conditions, extraction, last_number, latex, math_verify, matrices, numbers, parsing_work, quantities,
    terms, units,
)  # fmt: skip
CHOICES = (options, choices, weighing)


def patterns(modules: Sequence[ModuleType]) -> Iterator[tuple[str, re.Pattern[str]]]:
    for module in modules:
        for name, value in vars(module).items():
            found = value if isinstance(value, list) else [value]
            for place, item in enumerate(found):
                pattern = item[0] if isinstance(item, tuple) and item else item
                pattern = pattern.all if isinstance(pattern, options.Lettered) else pattern
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


def test_texts_of_options_take_linear_steps() -> None:
    pattern = choices._own_texts(("A z-test", "A", "A A b c", "answer is A and B"), "ABCDE")
    assert pattern is not None
    assert deep(lambda: [part for part in (*CHOOSING, "A) A A b ") if grows(pattern, part)]) == []


def test_phrases_of_other_languages_take_linear_steps() -> None:
    found = deep(
        lambda: [
            (foreign.phrase.all.pattern, part)
            for foreign in choices.foreign_phrases()
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
                                  extraction.own_answer, extraction.decisions, numbers.answered_number,
                                  parsing_work.is_light])  # fmt: skip
@pytest.mark.parametrize(
    "part", ["9", " ", "{", "\\boxed{1} ", "\\boxed{", "$1$ ", "1,234,", "answer is 1, ", "(1 aa) ", "2^", "3!", "^{"]
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


def matrix(size: int, environment: str = "pmatrix") -> str:
    rows = ("&".join(f"x_{{{row}{column}}}" for column in range(size)) for row in range(size))
    return rf"\begin{{{environment}}}" + r"\\".join(rows) + rf"\end{{{environment}}}"


HEAVY = (
    matrix(6, "vmatrix"), matrix(4, "vmatrix"), rf"\det{matrix(6)}", rf"\det({matrix(4, 'bmatrix')})",
    rf"\operatorname{{rank}}({matrix(4)})", rf"e^{{{matrix(3)}}}", rf"e^{matrix(3)}", rf"x^{{2+({matrix(3)})}}",
    r"\operatorname{ones}(3000,3000)", r"\operatorname{eye}(20000)", r"\Gamma(99999999)", r"\sqrt[9^{9^9}]{2}",
    r"9^x|_{x=99999999}", r"\left.9^x\right|_{x=99999999}", r"\binom{\sqrt{2}}{900}", r"{e \choose 900}",
    r"\binom{99999}{50000}", r"\gcd(\sqrt{2}+\sqrt{3},\sqrt{5})", r"\gcd(2^{10000}-1,2^{5000}-1)",
    r"(\sin(99^{99999}),2)", r"(0,((9^{999})^{999})^{999})", r"[0,((9!)!)!]", r"(0,9^{99999\cdot99999})",
    r"(0,(1+1)^{9999999999})",
)  # fmt: skip


@pytest.mark.parametrize("formula", HEAVY)
def test_large_computations_never_reach_the_parser(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    parse = importlib.import_module("math_verify").parse

    def light(text: str, *options: Any, **named: Any) -> Any:
        if formula in text or "\\det" in text or "vmatrix" in text:
            read.append(text)
            return []
        return parse(text, *options, **named)

    monkeypatch.setattr("math_verify.parse", light)
    texts = (f"\\boxed{{{formula}}}", f"It is ${formula}$.", f"\\[{formula}\\]", f"5$ is $ {formula}$",
             f"see [ {formula} ] here", formula)  # fmt: skip
    for text in texts:
        for name in ("math_answer", "ocw"):
            assert not find_grader(name)(text, {"answer": "34"})
            assert not find_grader(name)(text, {"answer": "x^2+1"})
        assert MathVerify()([text], answer=["34"]) == [0.0]
    assert read == []


@pytest.mark.parametrize(
    "formula",
    [
        r"2^{99999}", r"((3!)!)!", r"(-1)^{1000000007}", r"10^{-34}", r"e^{-x^2/2}", r"\binom{2n}{n}", r"\binom{52}{5}",
        r"\binom{\frac{n}{2}}{k+1}", r"\gcd(12,18)", r"|x|^2", r"x^{10}+x^9+x^8+x^7+x^6+1", r"(1+x)^{10000}-1",
        r"\sin^{100} x", matrix(5), r"\frac{6!}{3!}", r"|a_1|+|a_2|", r"\Gamma(n+1)",
    ],
)  # fmt: skip
def test_small_computations_are_read(formula: str) -> None:
    assert math_verify.is_readable(formula)
