"""Answers read by math-verify, compared symbolically."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import product
from typing import Any

from gruppo.data.boxes import last_box
from gruppo.rewards.grading.digits import ascii_digits
from gruppo.rewards.grading.extraction import tags
from gruppo.rewards.grading.latex import braced, formulas, ratio_as_tuple, with_products, without_end_mark
from gruppo.rewards.grading.matrices import plain_rows, without_determinants
from gruppo.rewards.grading.parsing_work import is_light
from gruppo.rewards.grading.symbolic import same_expression
from gruppo.rewards.grading.units import units_of, without_unit

_DELIMITED = re.compile(r"(?<!\\)(?:\$|\\[(\[])|\\boxed")


_SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][-+]?\d{1,2}(?![\w.])", re.ASCII)


_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d+)$")


FORMULA = 500  # characters of a formula that is parsed
NESTED = 20  # brackets in brackets in such a formula
TOWER = 2  # exponents in an exponent
PASSAGE = 4000  # characters of a text in which math-verify looks for an answer
FORMULAS = 20  # formulas in that passage


def same_mathematics(text: str, answer: object, question: str = "") -> bool | None:
    """Whether the answer in `text` equals `answer` symbolically; None if `answer` cannot be read.

    `text`: if it has <answer> tags, only the content of the last pair counts. The answer is the last \\boxed{}, else
    what follows "the answer is", else the last formula or number, as math-verify finds it in the last `PASSAGE`
    characters; a text with none of these equals nothing. `answer`: a number, LaTeX with or without dollar signs, a text
    with \\boxed{}, or a GSM8K solution, of which the part after "####" counts. Formulas above the limits of
    `is_readable` are not read. `question` shows which letters are units.
    """
    wanted = _reference(ascii_digits(str(answer)))
    if not wanted:
        return None
    units = units_of(str(answer), question)
    text = ascii_digits(text)
    if tagged := tags(text):
        text = tagged[-1].content
    text = without_end_mark(text)
    found = parse_formulas(_SCIENTIFIC.sub(_written_out, _passage(text, units)))
    return any(_same(one, other) for one, other in product(wanted, found))


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, str) or isinstance(found, str):
        return isinstance(wanted, str) and isinstance(found, str) and wanted.strip() == found.strip() != ""
    return same_expression(wanted, found)


@lru_cache(maxsize=1024)
def _reference(answer: str) -> tuple[Any, ...]:
    answer = answer.rpartition("####")[2].strip()
    if not _DELIMITED.search(answer):
        answer = f"${_EXPONENT.sub(_power_of_ten, answer)}$"
    parsed = parse_formulas(_passage(answer, units_of(answer, "")))
    return tuple(parsed) if any(not isinstance(expression, str) for expression in parsed) else ()


def _power_of_ten(exponent: re.Match[str]) -> str:
    return rf"\cdot 10^{{{int(exponent[1])}}}"


def _written_out(number: re.Match[str]) -> str:
    return f"{Decimal(number[0]):f}"


def _passage(text: str, units: Collection[str]) -> str:
    """The end of a text in which math-verify looks for the answer: its last boxes as one list, or its last formulas."""
    if box := last_box(text):
        content = _prepared(_DOLLAR.sub("", box[1]), units)
        return f"$\\boxed{{{content}}}$" if is_readable(content) else ""
    found = formulas(text)
    begin = max(len(text) - PASSAGE, found[-FORMULAS].start if len(found) > FORMULAS else 0)
    parts = []
    for formula in found:
        if formula.start >= begin:
            parts.append(_light(text[begin : formula.start]))
            size = 2 if formula.text.startswith(("$$", "\\")) else 1
            inner = _prepared(formula.text[size:-size], units)
            if is_readable(inner):
                parts.append(formula.text[:size] + inner + formula.text[-size:])
            begin = formula.end
    return "".join([*parts, _light(text[begin:])]).replace("\\boxed", "")


def _prepared(formula: str, units: Collection[str]) -> str:
    """A formula without its unit, with the values of its determinants, and with ratios of several parts as tuples."""
    return ratio_as_tuple(without_unit(without_determinants(with_products(braced(plain_rows(formula)))), units))


def _light(text: str) -> str:
    """Text outside formulas; a space if it asks for a large computation, since math-verify may find a formula in it."""
    return text if is_light(text) else " "


def is_readable(formula: str) -> bool:
    """Whether a formula is short and flat enough to be parsed, and asks for no large computation while it is parsed."""
    if len(formula) > FORMULA or not is_light(formula):
        return False
    depth = 0
    raised: list[int] = []  # depths of the exponents that are open
    for mark in _STRUCTURE.finditer(formula):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
            while raised and raised[-1] > depth:
                raised.pop()
        else:
            depth += 1
            raised.append(depth)
        if depth > NESTED or len(raised) > TOWER:
            return False
    return True


_DOLLAR = re.compile(r"\\?\$")
_STRUCTURE = re.compile(r"\^\s*+\{|[()\[\]{}]")


@lru_cache(maxsize=1)
def _kinds() -> tuple[Any, ...]:
    """What math-verify extracts: LaTeX, boxes first, without dropping units, then plain numbers and expressions."""
    import logging

    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    steps = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="all")
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)  # it warns that no time limit is set
    return LatexExtractionConfig(boxed_match_priority=0, normalization_config=steps), ExprExtractionConfig()


def parse_formulas(text: str, formula: bool = False) -> Sequence[Any]:
    """Expressions that math-verify finds in a text, boxes first, followed by their text; [] if there are none.

    `formula`: read LaTeX only; a number in a formula that cannot be parsed is not its value.
    """
    from math_verify import parse

    if not is_light(text):
        return []
    try:
        return parse(text, _kinds()[: 1 if formula else 2], parsing_timeout=None, raise_on_error=True)  # type: ignore[no-any-return]
    except Exception:  # noqa: BLE001  text that cannot be parsed is not an answer
        return []
