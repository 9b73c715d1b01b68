"""Math answers for evaluation: formulas, sets, intervals, tuples, matrices, equations, words, several answers.

math-verify does the comparison. Cases in which it is too lenient or too strict are decided first: order in tuples,
kinds of brackets, number bases, tiny numbers, words, units, several blanks ("5;10").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from gruppo.data.boxes import boxes, last_box
from gruppo.errors import UsageError
from gruppo.rewards.grading.complex_numbers import with_one_unit
from gruppo.rewards.grading.conditions import (
    condition,
    members,
    same_condition,
    without_domain,
    without_marks,
)
from gruppo.rewards.grading.extraction import decisions, last_sentence, own_answer
from gruppo.rewards.grading.labels import unlabelled_pair
from gruppo.rewards.grading.latex import (
    WORD,
    Formula,
    formulas,
    split,
    without_end_mark,
)
from gruppo.rewards.grading.math_verify import is_readable, parse_formulas, same_mathematics
from gruppo.rewards.grading.matrices import (
    flat,
    from_lists,
    is_matrix,
)
from gruppo.rewards.grading.normal_form import LISTED, normal
from gruppo.rewards.grading.quantities import Quantity, cleaned, quantities
from gruppo.rewards.grading.rounding import rounds_to
from gruppo.rewards.grading.stated import BETWEEN, said_formula
from gruppo.rewards.grading.symbolic import matched, same_expression
from gruppo.rewards.grading.units import BOUND, contradicts, is_limited, units_of, without_bound, without_unit

_WORDS_BEFORE = re.compile(rf"^\s*{WORD}\s*\{{[^{{}}]*\}}\s*:?\s*(?=[-\d\\(])")
_BASE = re.compile(r"(-?[0-9A-Fa-f.]+)\s*_\s*\{?\s*(\d+|\\text\{\w+\})\s*\}?")


_OMITTED = re.compile(r"(?:,|^)\s*\\ldots|\\ldots\s*,")  # items of a list that are left out


def same_formula(answer: str, wanted: str, question: str = "") -> bool:
    """Whether two answers mean the same; each is a formula, a list of formulas, or words.

    A letter after a number is a unit where `wanted` or `question` uses it as one, else a variable. Answers of more than
    `LONGEST` characters equal nothing.
    """
    if len(answer) > LONGEST or contradicts(answer, wanted, question):
        return False
    if BOUND.search(f"{wanted} {question}"):
        answer, wanted = without_bound(answer), without_bound(wanted)
    return _same(answer, wanted, units_of(wanted, question))


LONGEST = 2000


def _same(answer: str, wanted: str, units: Collection[str]) -> bool:
    first, second = normal(answer), normal(wanted)
    if _squeezed(first) == _squeezed(second) and second:
        return True
    blanks = split(second, ";")
    if len(blanks) > 1:
        return _same_blanks(first, blanks, units)
    if is_words(second):
        return _words(first) == _words(second) or _word_list(first) == _word_list(second)
    return _same_one(first, second, units)


def _same_blanks(answer: str, wanted: Sequence[str], units: Collection[str]) -> bool:
    parts = split(answer, ";")
    if len(parts) != len(wanted):
        parts = [part for part in split(LISTED.sub(",", answer) if "(" not in answer else answer, ",;") if part]
    return len(parts) == len(wanted) and all(_same(*pair, units) for pair in zip(parts, wanted, strict=True))


def _same_one(answer: str, wanted: str, units: Collection[str]) -> bool:
    bases = _BASE.fullmatch(answer), _BASE.fullmatch(wanted)
    if bases[1]:
        return (bases[0][1], bases[0][2]) == (bases[1][1], bases[1][2]) if bases[0] else answer == bases[1][1]
    plain = _bare(answer, units), _bare(wanted, units)
    numbers = _quantity(plain[0]), _quantity(plain[1])
    if numbers[0] and numbers[1] and len({*_named(plain[0]), *_named(plain[1])}) < 2:
        return _same_value(numbers[0], numbers[1])
    return _same_by_shape(plain[0] if not is_words(answer) else answer, plain[1], units)


def _same_by_shape(answer: str, wanted: str, units: Collection[str]) -> bool:
    """Compare two formulas in the same notation: matrices, functions without labels, conditions on a number."""
    if is_matrix(answer) != is_matrix(wanted):
        answer, wanted = from_lists(answer), from_lists(wanted)
    if is_matrix(answer) != is_matrix(wanted):
        answer, wanted = flat(answer), flat(wanted)
    if bool(_OMITTED.search(answer)) != bool(_OMITTED.search(wanted)):
        return False
    pair = unlabelled_pair(without_domain(answer), without_domain(wanted))
    if pair is None:
        return False
    answer, wanted = pair
    answer, wanted = members(condition(answer)), members(condition(wanted))
    by_range = same_condition(answer, wanted, _parsed)
    if by_range is not None:
        return by_range
    return _same_parts(without_marks(answer), without_marks(wanted), units)


def _same_parts(answer: str, wanted: str, units: Collection[str]) -> bool:
    """Compare two formulas part by part: lists, sets and tuples, their brackets and order; one formula by its value."""
    if _JOINED.search(answer) or _JOINED.search(wanted):
        return _verified(answer, wanted)
    kinds = _brackets(answer), _brackets(wanted)
    if {"set", "tuple"} == set(kinds) or (None not in kinds and kinds[0] != kinds[1]):
        return False
    if kinds[1] == "tuple" and kinds[0] is None:
        parts = split(LISTED.sub(",", answer), ",")
        if len(parts) == len(split(wanted[1:-1], ",")) > 1:
            answer = f"({','.join(_in_order(parts))})"
    if kinds[0] == "tuple" and kinds[1] is None:
        parts = split(LISTED.sub(",", wanted), ",")
        values = _in_order(parts)
        wanted = f"({','.join(values)})" if len(parts) > 1 and values != parts else wanted
    if _brackets(answer) == _brackets(wanted) == "tuple":
        pairs = split(answer[1:-1], ","), split(wanted[1:-1], ",")
        return len(pairs[0]) == len(pairs[1]) and all(_same(*pair, units) for pair in zip(*pairs, strict=True))
    items = _distinct(answer, units), _distinct(wanted, units)
    if len(items[0]) > len(items[1]) == 1 and _brackets(answer) is None:
        return _is_repeated(items[0], wanted, units)
    if max(map(len, items)) > 1:
        return matched(items[1], items[0], lambda one, other: _same(other, one, units))
    return _verified(answer, wanted)


def _is_repeated(items: Sequence[str], wanted: str, units: Collection[str]) -> bool:
    r"""Whether the items of an answer are different forms of one value: "\frac12, or 0.5", but not "1, 1"."""
    forms = {_squeezed(item) for item in items}
    return len(forms) == len(items) <= REPEATED and all(_same(item, wanted, units) for item in items)


def _distinct(text: str, units: Collection[str]) -> Sequence[str]:
    """The items of a list, or those of a set without repetition."""
    items = _items(text)
    if _brackets(text) != "set":
        return items
    items = list({_squeezed(item): item for item in items}.values())
    if len(items) > REPEATED:
        return items
    return [item for place, item in enumerate(items) if not any(_same(item, one, units) for one in items[:place])]


def _items(text: str) -> Sequence[str]:
    r"""The items of a list or set, with both values of a \pm; one item for anything else."""
    text = text.strip()
    inner = text[2:-2] if _brackets(text) == "set" else text
    parts = [part for part in split(LISTED.sub(",", inner), ",") if part]
    return [value for part in parts for value in _both_signs(part)]


def _both_signs(text: str) -> Sequence[str]:
    r"""The two values of a formula with \pm or \mp, which have opposite signs; any other formula unchanged."""
    if not _PLUS_MINUS.search(text):
        return [text]
    return [text.replace("\\pm", signs[0]).replace("\\mp", signs[1]) for signs in ("+-", "-+")]


_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


_JOINED = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")  # sets


def _in_order(parts: Sequence[str]) -> Sequence[str]:
    """The values of equations such as "y = 2", "x = 1", sorted by name; other parts unchanged."""
    pairs = [part.split("=") for part in parts]
    if all(len(pair) == 2 and len(pair[0].strip()) <= 3 for pair in pairs):
        return [pair[1] for pair in sorted(pairs, key=lambda pair: pair[0].strip())]
    return parts


def _verified(answer: str, wanted: str) -> bool:
    parsed, other = _parsed(wanted), _parsed(answer)
    return bool(parsed and other) and same_expression(*with_one_unit(parsed[0], other[0]))


@lru_cache(maxsize=2048)
def _parsed(formula: str) -> tuple[Any, ...]:
    if not is_readable(formula):
        return ()
    return tuple(part for part in parse_formulas(f"${formula}$", formula=True) if not isinstance(part, str))


def _squeezed(text: str) -> str:
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", text))


def _brackets(text: str) -> str | None:
    r"""The kind of brackets around several items: "set" for \{1,2\}, "tuple" for (1,2), "closed" for [1,2], …"""
    text = text.strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if text[:1] not in tuple("([") or text[-1:] not in tuple(")]") or len(split(text[1:-1], ",")) < 2:
        return None
    if any(part.count("(") != part.count(")") for part in split(text[1:-1], ",")):
        return None
    if _depth_breaks(text):
        return None
    return {"()": "tuple", "[]": "closed", "(]": "open-closed", "[)": "closed-open"}[text[0] + text[-1]]


def _depth_breaks(text: str) -> bool:
    """Whether the first bracket closes before the end, as in "(1,2) \\cup (3,4)"."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and place < len(text) - 1:
            return True
    return False


def _bare(text: str, units: Collection[str]) -> str:
    """A formula without leading words and without a trailing unit (`units`: letters that are units)."""
    words = _WORDS_BEFORE.match(text)
    return without_unit(text if words is None or is_limited(words[0]) else text[words.end() :], units)


_NAMED = re.compile(r"^([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*")


def _named(text: str) -> list[str]:
    return [found[1] for found in _NAMED.finditer(text)]


_PRODUCT = re.compile(r"(?<=\})(?=\d)")  # \frac{1}{2}3 is no fraction with 23


def _quantity(text: str) -> Quantity | None:
    """The number that a whole formula consists of, with sign, percent and a leading "x ="; None for other formulas."""
    clean = cleaned(_PRODUCT.sub(r"\\cdot ", _NAMED.sub("", text))).strip()
    found = quantities(clean)
    return found[0] if len(found) == 1 and clean[: found[0].start] + clean[found[0].end :] == "" else None


def _same_value(answer: Quantity, wanted: Quantity) -> bool:
    pairs = [(answer.value, wanted.value)]
    if answer.percent and not wanted.percent:
        pairs.append((answer.value / 100, wanted.value))
    if wanted.percent and not answer.percent:
        pairs.append((answer.value, wanted.value / 100))
    return any(one == other or rounds_to(one, answer.decimals, other, wanted.decimals) for one, other in pairs)


_MATH = re.compile(r"[\d=+<>^_/|]|\\(?!text|mathrm|mbox|textbf|rm\b)[a-zA-Z]+")


def is_words(text: str) -> bool:
    """Whether an answer is words: text of three or more letters, or of two or more Chinese characters, without math."""
    if "\\textcircled" in text:
        return True
    inner = re.sub(rf"{WORD}\s*\{{([^{{}}]*)\}}", r"\1", text)
    if _MATH.search(inner):
        return bool(re.fullmatch(rf"\s*{WORD}\s*\{{[^{{}}]*[A-Za-z]{{3,}}[^{{}}]*\}}\s*", text))
    return bool(re.search(r"[A-Za-z]{3,}|[\u4e00-\u9fff]{2,}", inner)) or inner != text


def _words(text: str) -> str:
    text = re.sub(rf"{WORD}\s*\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"[\s\"'“”‘’.,;:!?()（）\[\]{}。-]+", " ", text).strip().casefold()
    return re.sub(r"(?<=[a-z]{3})s\b", "", re.sub(r"^(?:the|an?) ", "", text))


def _word_list(text: str) -> list[str]:
    """Words between commas, semicolons, "and" and "or", sorted."""
    plain = re.sub(rf"{WORD}\s*\{{([^{{}}]*)\}}", r"\1", text)
    return sorted(_words(part) for part in re.split(r",|;|\band\b|\bor\b", plain) if part.strip())


def answered_formula(text: str, words: bool = False) -> tuple[str, str] | None:
    """The last decision of a text as (answer, rule); None if it has none.

    `words`: accept an answer in words. Otherwise a decision without any sign of math is skipped, unless it is in a box
    or tags.
    """
    text = own_answer(text)
    box = last_box(text)
    for decision in reversed(decisions(text)[-DECISIONS:]):
        if decision.rule == "boxed" and box and decision.start >= box[0]:
            return _unwrapped(box[1]), decision.rule
        said = decision.text if decision.rule in ("tags", "boxed") else said_formula(decision)
        if decision.rule == "label" and "=" in said and text.find("=", decision.start + len(said)) >= 0:
            continue
        if said and (words or decision.rule in ("tags", "boxed") or _FORMULA.search(said)):
            return _unwrapped(said), decision.rule
    return None


# Signs of a formula as opposed to words: digits, commands, symbols, a single letter, letters around an operator.
_FORMULA = re.compile(
    r"\d|\\|\$|[=^<>≤≥≠±²³∞π√∅]|\b(?:sin|cos|tan|ln|log|exp)\b|^\W*\w\W*$|(?<![A-Za-z])[A-Za-z]\s*[-+*/]\s*[A-Za-z](?![A-Za-z])"
)


def _unwrapped(text: str) -> str:
    """The content of the last box in a formula; a text without a box unchanged."""
    found = boxes(text)
    return found[-1].content if found else text


def reference_formula(answer: object) -> str:
    """The formula of a reference answer: the content of its last box, else the part after "####", else all of it."""
    text = str(answer).rpartition("####")[2].strip()
    box = last_box(text)
    return text if box is None else box[1]


def grade_formula(text: str, answer: object, question: str = "") -> bool:
    """Whether the answer in a text means the same as the reference.

    `question` shows which letters are units. Raises UsageError if the reference is empty.
    """
    wanted = reference_formula(answer)
    if not normal(wanted):
        raise UsageError(f"answer = {answer!r}: cannot be read as math; write LaTeX, or use another grader")
    words = is_words(normal(wanted))
    answered = answered_formula(text, words)
    if answered is not None:
        return same_formula(answered[0], wanted, question)
    return _without_decision(without_end_mark(own_answer(text)), wanted, words, question)


def _without_decision(text: str, wanted: str, words: bool, question: str) -> bool:
    """Grade a text without a decision: by all of it, its last formula, or, for words, the end of its last sentence."""
    if not text.strip():
        return False
    if len(text) < 200 and same_formula(text, wanted, question):
        return True
    last = last_sentence(text)
    if words:
        return f" {_words(last)}".endswith(f" {_words(normal(wanted))}")
    found = formulas(text)
    if found and not re.search(r"\d", text[found[-1].end :]):
        return _same_last(text, found, wanted, question)
    return bool(same_mathematics(text, wanted, question))


def _same_last(text: str, found: Sequence[Formula], wanted: str, question: str) -> bool:
    """Whether the last formula, its right-hand side, or all formulas joined to it ("x = 1 and x = 2") match.

    Formulas with only spacing between them may be the steps of a calculation, so that the last one may be the answer.
    """
    joined, marked = [found[-1]], False
    for before in reversed(found[-JOINED:-1]):
        between = BETWEEN.fullmatch(text, before.end, joined[-1].start)
        if not between:
            break
        joined.append(before)
        marked = marked or bool(between["mark"])
    last = joined[0].text
    if len(joined) > 1:
        if same_formula(", ".join(one.text for one in reversed(joined)), wanted, question):
            return True
        names = [_named(normal(one.text)) for one in joined]
        if marked and names[0] and all(name == names[0] for name in names):
            return False
    return any(same_formula(one, wanted, question) for one in (re.split(r"(?<![<>!\\])=", last)[-1], last))


DECISIONS = 50  # decisions that are tried, from the end
REPEATED = 20  # items of a set or list that are compared with each other
JOINED = 30  # formulas that may form one list


def grade_science(text: str, answer: object, question: str = "") -> bool:
    """Grade by the rules of OCWCourses (Minerva).

    A number is correct within 1e-5 (relative, plus 1e-8) of the reference, or within 1 % if both are below 1e-8; units
    are ignored. Any other answer is graded as a formula or an equation. Raises UsageError if the reference is empty.
    """
    from gruppo.rewards.grading.numbers import answered_number

    wanted = _quantity(normal(reference_formula(answer)))
    if wanted is None:
        return grade_formula(text, answer, question)
    answered = answered_number(text, question)
    return answered is not None and all(_close(reading.value, wanted.value) for reading in answered.readings)


def _close(first: Fraction, second: Fraction) -> bool:
    difference = abs(first - second)
    if max(abs(first), abs(second)) < Fraction(1, 10**8):
        return difference <= abs(first + second) / 200
    return difference <= Fraction(1, 10**8) + abs(second) / 10**5
