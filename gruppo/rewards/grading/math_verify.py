"""Symbolic comparison of answers with math-verify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import product
from typing import Any

_DELIMITED = re.compile(r"(?<!\\)(?:\$|\\[(\[])|\\boxed")


_SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][-+]?\d{1,2}(?![\w.])", re.ASCII)


_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d+)$")


MATH_SECONDS = 2  # limit for parsing and for every comparison; math-verify counts whole seconds


def same_mathematics(text: str, answer: object) -> bool | None:
    """Whether the answer in `text` equals `answer` symbolically, by math-verify; None if `answer` cannot be read.

    `text`: if it has <answer> tags, only the content of the last pair counts. The answer is the last \\boxed{}, else
    what follows "the answer is", else the last formula or number; a text with none of these equals nothing.
    `answer`: a number, LaTeX with or without dollar signs, a text with \\boxed{}, or a GSM8K solution, of which the
    part after "####" counts. Raises TimeoutError if parsing or a comparison takes longer than MATH_SECONDS.
    math-verify measures time with signals, which work in a process's main thread only.
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
    return tuple(parsed) if any(not isinstance(expression, str) for expression in parsed) else ()


def _power_of_ten(exponent: re.Match[str]) -> str:
    return rf"\cdot 10^{{{int(exponent[1])}}}"


def _written_out(number: re.Match[str]) -> str:
    return f"{Decimal(number[0]):f}"


def parse_formulas(text: str) -> Sequence[Any]:
    """Expressions that math-verify finds in a text, boxes first, followed by their text; [] if there are none.

    Raises TimeoutError after MATH_SECONDS.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    try:
        return parse(text, kinds, parsing_timeout=MATH_SECONDS, raise_on_error=True)  # type: ignore[no-any-return]
    except TimeoutException:
        raise TimeoutError(f"math-verify could not parse the text in {MATH_SECONDS} s: {text[-100:]!r}") from None
    except Exception:  # noqa: BLE001  text that cannot be parsed is not an answer
        return []


def _any_equal(wanted: Sequence[Any], found: Sequence[Any]) -> bool:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    timed_out = False
    for pair in product(wanted, found):
        try:
            if verify(*pair, timeout_seconds=MATH_SECONDS, raise_on_error=True):
                return True
        except TimeoutException:
            timed_out = True
        except Exception:  # noqa: BLE001  expressions that cannot be compared are not equal
            continue
    if timed_out:
        raise TimeoutError(f"math-verify could not compare the answer in {MATH_SECONDS} s")
    return False
