"""Comparing a text with a reference answer: by number, by text, by symbolic mathematics. For rewards and graders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from gruppo.errors import UsageError, nearest
from gruppo.utils.imports import import_attribute

# A sign counts unless it follows a number or a closing bracket, where it is an operator:
# "5-3" ends with 3, and so does "5 - 3".
_SIGN = r"(?:(?<![\d\w)\].])[-−+])?"
_FRACTION = rf"{_SIGN}(?<![\d./])\d+/\d+(?![\d/]|\.\d)"
_DECIMAL = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|{_SIGN}(?<![\d.])\.\d+"
_NUMBER = re.compile(f"{_FRACTION}|{_DECIMAL}", re.ASCII)

_DELIMITED = re.compile(r"(?<!\\)(?:\$|\\[(\[])|\\boxed")
_SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][-+]?\d{1,2}(?![\w.])", re.ASCII)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d+)$")
MATH_SECONDS = 2  # for reading, and for each comparison; math-verify counts in whole seconds

Grader = Callable[[str, Mapping[str, Any]], bool]


def last_number(text: str) -> Fraction | None:
    """The last number of a text: sign, thousands commas, decimals and fractions like 3/4; None where there is none.

    A division by zero ("1/0") is no number, nor is one of thousands of digits, which Python refuses to read.
    """
    for found in reversed(_NUMBER.findall(text)):
        try:
            return Fraction(found.replace(",", "").replace("−", "-"))
        except (ZeroDivisionError, ValueError):
            continue
    return None


def same_number(text: str, answer: object) -> bool:
    """True if the last number of `text` equals that of `answer`. Raises UsageError where the answer has none."""
    wanted = last_number(str(answer))
    if wanted is None:
        raise UsageError(f"answer = {answer!r}: holds no number; write a number, or take the grader exact_match")
    return last_number(text) == wanted


def same_mathematics(text: str, answer: object) -> bool | None:
    """Whether what `text` answers equals `answer` symbolically, by math-verify; None where `answer` cannot be read.

    `text`: of what stands in its last <answer> tags, or of all of it, the last \\boxed{}, else what follows "the answer
    is", else the last formula or number counts; without any of them it equals nothing. `answer`: a number, LaTeX with
    or without dollars, a text with \\boxed{}, or a solution in the form of GSM8K, where what follows "####" counts.
    Raises TimeoutError where math-verify takes longer than MATH_SECONDS. It works by signals: only in a main thread.
    """
    wanted = _reference(str(answer))
    if not wanted:
        return None
    if tagged := _TAGGED.findall(text):
        text = tagged[-1].strip()
    return _any_equal(wanted, parse_formulas(_SCIENTIFIC.sub(_written_out, text)))


@lru_cache(maxsize=1024)
def _reference(answer: str) -> tuple[Any, ...]:
    answer = answer.rpartition("####")[2].strip()
    if not _DELIMITED.search(answer):
        answer = f"${_EXPONENT.sub(_power_of_ten, answer)}$"
    parsed = parse_formulas(answer)
    return tuple(parsed) if any(not isinstance(each, str) for each in parsed) else ()


def _power_of_ten(exponent: re.Match[str]) -> str:
    return rf"\cdot 10^{{{int(exponent[1])}}}"


def _written_out(number: re.Match[str]) -> str:
    return f"{Decimal(number[0]):f}"


def parse_formulas(text: str) -> Sequence[Any]:
    """What math-verify reads in a text, boxes before all else: expressions, and at the end their text."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    try:
        return parse(text, kinds, parsing_timeout=MATH_SECONDS, raise_on_error=True)  # type: ignore[no-any-return]
    except TimeoutException:
        raise TimeoutError(f"math-verify could not read it in {MATH_SECONDS} s: {text[-100:]!r}") from None
    except Exception:  # noqa: BLE001  text that no parser understands is no answer
        return []


def _any_equal(wanted: Sequence[Any], found: Sequence[Any]) -> bool:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    late = False
    for pair in product(wanted, found):
        try:
            if verify(*pair, timeout_seconds=MATH_SECONDS, raise_on_error=True):
                return True
        except TimeoutException:
            late = True
        except Exception:  # noqa: BLE001  things that cannot be compared are not equal
            continue
    if late:
        raise TimeoutError(f"math-verify could not compare the answer in {MATH_SECONDS} s")
    return False


def same_text(text: str, answer: object) -> bool:
    """True if text and answer are equal, white space at the ends apart."""
    return text.strip() == str(answer).strip()


def _grade_number(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.numbers import grade_number

    return grade_number(text, _answer(columns), columns)


def _grade_exact(text: str, columns: Mapping[str, Any]) -> bool:
    return same_text(text, _answer(columns))


def _grade_math(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.formulas import grade_formula

    return grade_formula(text, _solution(columns))


def _grade_science(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.formulas import grade_science

    return grade_science(text, _solution(columns), columns)


def _grade_choice(text: str, columns: Mapping[str, Any]) -> bool:
    from gruppo.rewards.grading.choices import grade_choice

    return grade_choice(text, _answer(columns), columns)


def _solution(columns: Mapping[str, Any]) -> Any:
    return columns["solution"] if "answer" not in columns and "solution" in columns else _answer(columns)


def _answer(columns: Mapping[str, Any]) -> Any:
    if "answer" not in columns:
        raise UsageError(f"a question has no answer (columns: {', '.join(columns) or 'none'}); add a column answer")
    return columns["answer"]


def _grade_gym(text: str, columns: Mapping[str, Any]) -> bool:
    """Full score by the rules of the row's reasoning-gym data set; part of it is not right."""
    from gruppo.data.reasoning_gym import score

    return score(text, columns) >= 1.0


GRADERS: dict[str, Grader] = {
    "number": _grade_number,
    "exact_match": _grade_exact,
    "math": _grade_math,
    "ocw": _grade_science,
    "choice": _grade_choice,
    "reasoning_gym": _grade_gym,
}


class Named(NamedTuple):
    """A grader by its name."""

    name: str
    grader: Grader


def find_grader(name: str) -> Grader:
    """The grader of that name or import path: (text, columns) -> right or wrong. Raises UsageError for an unknown
    one."""
    if name in GRADERS:
        return GRADERS[name]
    if ":" not in name:
        raise UsageError(f'evaluation.grader = "{name}": unknown grader{nearest(name, GRADERS)}')
    grader: Grader = import_attribute(name, "evaluation.grader")
    return grader
