"""Numbers as people and models write them, read for evaluation: units, currency, percent, fractions, powers of ten.

The reward `answers.last_number` does not use these rules: it is deliberately simpler, and its rules are fixed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from gruppo.data.boxes import last_box
from gruppo.data.references import listed_in
from gruppo.errors import UsageError
from gruppo.rewards.grading.arithmetic import calculated
from gruppo.rewards.grading.extraction import Decision, decisions, last_sentence, own_answer, sentence
from gruppo.rewards.grading.quantities import Quantity, cleaned, quantities, same_quantity, spelled
from gruppo.rewards.grading.stated import GIVEN, SO
from gruppo.rewards.grading.symbolic import matched
from gruppo.rewards.grading.terms import CONTINUED, has_variable, settled
from gruppo.rewards.grading.units import EVERYDAY, units_of


@dataclass(frozen=True)
class Answered:
    """The number that a text gives as its answer.

    `readings`: the number, or several if the text leaves them open ("3 or 4"). `text`: the passage. `rule`: the rule
    that found it.
    """

    readings: tuple[Quantity, ...]
    text: str
    rule: str


_ABOUT = re.compile(
    r"[\s:：]*+(?:(?:either|approximately|about|around|exactly|only|just|equal to|roughly|a total of|USD|Rs\.?|is|are|"
    r"大约|约|共|一共|总共|[A-Za-z](?:_\{?\w+\}?)?\s*[=:])\s*+)*+[\s(\[{]*+(?=[-+]?[\d.])"
)


_OR = re.compile(
    r"\s*(?:[A-Za-z%]+\s+){0,2}(?:or|to|或者?|到)\s+(?=[-+]?[\d.])|\s*-\s*(?=\d)"
    r"|\s*(?:hours?|hrs?|h|days?|weeks?|years?|feet|ft|pounds?|lbs?|小时|天|年)(?:,?\s*and|,)?\s*"
    r"(?=[\d.]+\s*(?:minutes?|mins?|seconds?|hours?|days?|months?|inch|ounces?|分|秒|个月))"
)


_SPACED = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3}){1,9})(?![\d,])")


# Groups of three digits that are one number wherever they stand: "70 000", "1 234 567".
_SPACED_WIDE = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?: \d{3}){0,9} 000|(?: \d{3}){2,9})(?![\d,])")


def read_decision(decision: Decision, units: Collection[str] = EVERYDAY) -> tuple[Quantity, ...]:
    """The number that a decision states: several readings if it leaves the number open, empty if it states none.

    A formula that is not one number ("13x", "5\\sqrt3") leaves it open. `units`: letters that are units after a number;
    any other letter there is a variable.
    """
    clean = cleaned(decision.text)
    if _MATRIX.match(decision.text):
        return _open(Quantity(Fraction(0), 0, False, 0, 0))
    if decision.rule in ("tags", "boxed"):
        return _whole(clean, units)
    clean = _SPECIFIED.sub("", sentence(clean))
    clean = _SPACED.sub(lambda found: found[0].replace(" ", ""), clean, count=1) if _ABOUT.match(clean) else clean
    numbers = quantities(clean)
    begins = _ABOUT.match(clean)
    if not numbers:
        word = spelled(clean, last=False)
        return (word,) if word else ()
    if _UNKNOWN.search(clean) or (begins and has_variable(clean, numbers[0], units)):
        return _open(numbers[0])
    if between := _BETWEEN.match(clean):
        return tuple(number for number in numbers if number.start >= between.end())[:2]
    if decision.rule in ("label", "####") and not begins:
        return _in_line(clean, numbers, units) if decision.rule == "label" else ()
    if not begins:
        return _in_line(clean, numbers, units) or _settled(clean, numbers[-1], units)
    if worked := _WORKED_OUT.match(clean, begins.end()):
        return (next(number for number in numbers if number.end >= worked.end()),)
    chained = _chained(clean, begins.end(), numbers)
    if decision.rule == "label" and chained is numbers[0] and _operator(clean, chained.end):
        return ()
    if chained is numbers[0] and (_operator(clean, chained.end) or _RAISED.match(clean, chained.end)):
        value = calculated(clean[begins.end() :])
        if value is None:
            return _settled(clean, chained, units)
        result = Quantity(value, None, False, 0, 0)
        return (chained, result) if _operator(clean, chained.end) else (result,)  # "8 + 19" is not an answer yet
    listed = _is_list(clean)
    if listed and len(_listed(clean)) != len(numbers):
        return _open(chained)
    chosen = numbers if listed else _alternatives(clean, chained, numbers)
    settled_ones = [_settled(clean, number, units) for number in chosen]
    return tuple(reading for readings in settled_ones for reading in readings)


def _in_line(clean: str, numbers: Sequence[Quantity], units: Collection[str]) -> tuple[Quantity, ...]:
    """The number of a line after a label that begins with words: the result of its last equation, the number after its
    last verb, or the only one not given.
    """
    begin, end = _conclusion(clean, numbers)
    numbers = [number for number in numbers if begin <= number.start < end]
    outside = _outside(clean, numbers)
    if result := _equated(clean, numbers, begin):
        return _settled(clean, result, units)
    if len(outside) == 1 and len(clean) < 80:
        return _settled(clean, outside[0], units)
    verb = max((verb.end() for verb in _VERB.finditer(clean, begin, end)), default=None)
    stated = [number for number in outside if verb is not None and number.start >= verb]
    if stated and _ABOUT.match(clean, verb or 0):
        return _settled(clean, stated[0], units)
    new = [one for one in outside if not GIVEN.search(clean, max(0, one.start - 20), one.start)]
    return _settled(clean, new[0], units) if len(new) == 1 else ()


def _conclusion(clean: str, numbers: Sequence[Quantity]) -> tuple[int, int]:
    """The span of a sentence that concludes: after its last "so" and before "because", if numbers are there."""
    reason = _REASON.search(clean, numbers[0].end)
    end = reason.start() if reason else len(clean)
    last = next((number.start for number in reversed(numbers) if number.start < end), 0)
    return max((so.end() for so in SO.finditer(clean, 0, last)), default=0), end


_REASON = re.compile(r"\b(?:because|since)\b|因为")


_MATRIX = re.compile(
    r"[\s$]*+(?:\\[(\[]|\\left)?\s*+[(\[|]?\s*+\\begin\{(?:[a-zA-Z]?(?:small)?matrix\*?|array|cases)\}"
)


# Terms with an unknown or an error margin: "13x", "x + 13", "13 ± 2".
_UNKNOWN = re.compile(
    r"^\s*(?:-?\s*[a-z]\s*[-+*/]\s*\d|[-+]?[\d.,]+(?:[xyz]\b|\s*[-+*/]\s*[xyz]\b)(?!\s*=)|[-+]?[\d.,]+\s*(?:±|\\pm\b))"
)


_BETWEEN = re.compile(r"\s*(?:somewhere )?between (?=[^a-z]*\d[^a-z]*\band\b)")


_BOUND = re.compile(
    r"\b(?:(?:less|more|fewer|greater|larger|smaller|higher|lower) than|at (?:least|most)|no (?:more|less|fewer) than|"
    r"up to|minimum|maximum|least|most|above|below|over|under)\b|至少|至多|最多|最少|大于|小于|超过|不到|[<>≤≥≠±]|"
    r"\\(?:leq?(?:slant)?|geq?(?:slant)?|lt|gt|neq?|pm|mp)(?![A-Za-z])"
)


_SPECIFIED = re.compile(r"[,，]\s*其中.*$")


_RAISED = re.compile(r"\s*\^\s*\{?\d")


# An expression with its value: "1/3 of 54, which is 18".
_WORKED_OUT = re.compile(
    r"[-+]?[\d.,/]+\s*(?:[-+*/×÷]|of|plus|minus|times|divided by|multiplied by)\s*[\d.][^=;()]{0,40}?"
    r"(?:,\s*|\s)(?:which (?:is|equals|gives|makes|comes to)|i\.e\.,?|that is,?|so|or|equals|is)\s+"
    r"(?:[a-z]+\s+){0,2}[-+]?[\d.,/]*\d"
)


def _open(number: Quantity) -> tuple[Quantity, ...]:
    """Readings that contradict each other: the answer is not a number yet."""
    return number, replace(number, value=number.value + 1)


def _settled(clean: str, number: Quantity, units: Collection[str], worked_out: bool = False) -> tuple[Quantity, ...]:
    """The reading of a number in its formula, open if the formula is not one number."""
    parted = _is_coordinate(clean, number) or _ONE_OF_TWO.search(clean, max(0, number.start - 60), number.start)
    found = None if parted else settled(clean, number, units, worked_out)
    return _open(number) if found is None else (replace(found, bound=True),) if _limited(clean, number) else (found,)


# Another value of the same letter before a number: "x = 5 or x = 3".
_ONE_OF_TWO = re.compile(r"([A-Za-z])\s?=\s?[-+]?[\d.,/]+,?\s(?:or|and)\s\1\s?=\s?$")


def _is_list(clean: str) -> bool:
    """Whether a text is a list of formulas, without words: "0, \\pi, 2\\pi"."""
    parts = _LIST_MARK.split(_THOUSANDS.sub("", clean.strip(" .")))
    return sum(bool(part.strip()) for part in parts) > 1 and not _NOUN.search(clean)


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|\\[,;:! ]")  # commas and spacing that separate no items


def _is_coordinate(clean: str, number: Quantity) -> bool:
    """Whether a number is a part of a point or an interval: "(1, 2)", "[0,\\infty)"."""
    begin = max(0, number.start - 60)
    for pair in _PAIR.finditer(clean, begin, number.end + 60):
        if pair.start() < number.start < pair.end():
            others = clean[pair.start() : number.start] + clean[number.end : pair.end()]
            return "," in others and not _NOUN.search(others)
    return False


_PAIR = re.compile(r"[(\[][^()\[\]\n]*+[)\]]")
_NOUN = re.compile(r"(?<![A-Za-z\\])(?!and\b|or\b)[A-Za-z]{2,}|[ie]\.[eg]\b|[\u4e00-\u9fff]")


def _limited(clean: str, number: Quantity) -> bool:
    """Whether words before a number make it a bound: "at least 13"."""
    return bool(_LIMIT.search(clean, max(0, number.start - 40), number.start))


_LIMIT = re.compile(
    r"(?:\b(?:less|more|fewer|greater|larger|smaller|higher|lower) than|\bat (?:least|most)|"
    r"\bno (?:more|less|fewer) than|至少|至多|最多|最少|大于|小于|超过|不到)\s*(?:about |only |just )?[\s({*]*$"
)


def _whole(clean: str, units: Collection[str]) -> tuple[Quantity, ...]:
    """The number of a box or of tags: its last equation's result, the value of an expression, or its only number."""
    clean = _SPACED.sub(lambda found: found[0].replace(" ", ""), clean.strip())
    numbers = quantities(clean)
    if not numbers:
        word = spelled(clean, last=False)
        return (word,) if word else _open(Quantity(Fraction(0), 0, False, 0, 0)) if _SYMBOLIC.search(clean) else ()
    begin = max((found.end() for found in _EQUALS.finditer(clean)), default=0)
    numbers = [number for number in numbers if number.start >= begin] or numbers
    about = _ABOUT.match(clean, begin)
    if len(numbers) > 1 and len(_listed(clean)) == len(numbers):
        chosen = tuple(numbers)
    elif _is_list(clean):
        return _open(numbers[0])
    elif about and len(numbers) > 1 and calculated(clean[begin:]) is None:
        chosen = _alternatives(clean, numbers[0], numbers)
    else:
        chosen = (numbers[0] if about else numbers[-1],)
    return tuple(reading for number in chosen for reading in _settled(clean, number, units, worked_out=True))


_EQUALS = re.compile(r"(?:=|\\approx|≈)(?=\s*+\S)")


# A formula without digits, as opposed to words: "\\pi", "x", "a + b".
_SYMBOLIC = re.compile(
    r"\\(?:pi|sqrt|log|ln|infty|frac|pm)(?![A-Za-z])|[√π∞]|^\W*[b-z]\W*$|(?<![A-Za-z])[a-z]\s?[-+*/^=]\s?[a-z](?![A-Za-z])"
)


def _chained(clean: str, start: int, numbers: Sequence[Quantity]) -> Quantity:
    """The result of an equation, else the first number: 7 in "3 + 4 = 7 apples" and in "7 apples in 3 days"."""
    part = re.split(r"[(（;]|, | since | because | as | which | for ", clean[start:])[0]
    equals = [found.end() for found in re.finditer(r"=|\\approx|≈", part)]
    if not equals:
        return numbers[0]
    after = [number for number in numbers if number.start >= start + equals[-1]]
    if not after:
        return numbers[0]
    if _operator(clean, after[0].end) and calculated(part[equals[-1] - start :]) == numbers[0].value:
        return numbers[0]  # "18 = 2 * 9"
    return after[0]


def _operator(clean: str, end: int) -> bool:
    return bool(re.match(r"\s*(?:[-+*/×÷]|\\times|\\cdot|\\div)", clean[end:]))


def _alternatives(clean: str, first: Quantity, numbers: Sequence[Quantity]) -> tuple[Quantity, ...]:
    found = [first]
    while (other := _OR.match(clean, found[-1].end)) is not None:
        after = [number for number in numbers if number.start >= other.end() - 1]
        if not after:
            break
        found.append(after[0])
    return tuple(found)


def _equated(clean: str, numbers: Sequence[Quantity], begin: int = 0) -> Quantity | None:
    """The result of the last equation of a sentence that begins at `begin`: 7 in "he has 3 + 4 = 7 in 2 bags" and in
    "7 = 3 + 4"; None without an equation, or if a conclusion with another number follows it ("so", "in total").

    In brackets with words, an equation counts only if its result stands outside too.
    """
    outside = _outside(clean, numbers, begin)
    last = numbers[-1].start if numbers else begin
    ends = [found.end() for found in _EQUALS.finditer(clean, begin, last + 1)]
    after = [number for number in numbers if ends and number.start >= ends[-1]]
    if not after or _CONCLUSION.search(clean, after[0].end, max(one.start for one in (after[0], *outside))):
        return None
    if after[0] not in outside and after[0].value not in {number.value for number in outside}:
        return None
    before = [number for number in numbers if number.end <= ends[-1]]
    if before and _operator(clean, after[0].end) and calculated(clean[ends[-1] : after[-1].end]) == before[-1].value:
        return before[-1]
    return after[0]


def answered_number(text: str, question: str = "", reference: str = "") -> Answered | None:
    """The number that a text gives as its answer; None if it contains no number.

    The last decision that states a number counts ("the answer is 18", a box, "#### 18"). Without one, the last number
    of the text counts, unless the same sentence has an equation whose result it follows, or it only repeats `question`
    and the sentence has exactly one number that does not.
    """
    text = own_answer(text)
    units = units_of(reference, question) if question else EVERYDAY
    bounds = bool(_BOUND.search(f"{reference} {question}"))
    box = last_box(text)
    for decision in reversed(decisions(text)[-DECISIONS:]):
        shown = box[1] if box and decision.rule == "boxed" and decision.start >= box[0] else decision.text
        if decision.rule == "label" and _continues_to_calculate(text, decision):
            continue
        if readings := read_decision(decision._replace(text=shown), units):
            return Answered(_without_bounds(readings, bounds), decision.text[:200], decision.rule)
    clean = _SPACED_WIDE.sub(lambda found: found[0].replace(" ", ""), cleaned(text))
    written = quantities(clean)
    numbers = [number for number in written if not _DENIED.search(clean, max(0, number.start - 40), number.start)]
    if written and not numbers:
        return None
    if numbers:
        chosen = _computed(clean, numbers, question)
        readings = _without_bounds(_settled(clean, chosen, units), bounds)
        return Answered(readings, clean[chosen.start : chosen.end], "last number")
    word = spelled(last_sentence(clean), last=True)
    return Answered((word,), last_sentence(clean)[:200], "last number") if word else None


def _without_bounds(readings: tuple[Quantity, ...], bounds: bool) -> tuple[Quantity, ...]:
    """The readings; open if one is a bound and `bounds` are not asked for."""
    return _open(readings[0]) if not bounds and any(reading.bound for reading in readings) else readings


# Words before a number that deny it or only suppose it: "the answer is not 18", "it's 18, not 20".
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot be|(?:wrong|incorrect) answer is|answer (?:could|might|may) be)|n't(?: be)?|不是|不等于)"
    r"\s*(?:equal to |exactly |simply |just )?$",
    re.IGNORECASE,
)


def _continues_to_calculate(text: str, decision: Decision) -> bool:
    """Whether the text continues to calculate after "Answer:"."""
    line = sentence(decision.text)
    return "=" in line and text.find("=", decision.start + len(line)) >= 0


def _computed(clean: str, numbers: Sequence[Quantity], question: str) -> Quantity:
    """The answer of a text without a decision: the result of the last equation in its last number's sentence, else that
    number.

    Numbers in brackets with words do not count ("12 fruits (9 apples and 3 pears)"). If the last number only repeats
    the question and the sentence has exactly one that does not, that one counts ("so he makes 18 dollars from the 16
    eggs").
    """
    last = numbers[-1]
    begin = max(found.end() for found in _BEGIN.finditer(clean, 0, last.start))
    within = [number for number in numbers if number.start >= begin]
    outside = _outside(clean, within, begin)
    last = outside[-1] if outside else last
    if result := _equated(clean, within, begin):
        return result
    asked = {number.value for number in quantities(cleaned(question))}
    new = {number.value: number for number in outside if number.value not in asked}
    return next(iter(new.values())) if last.value in asked and len(new) == 1 else last


_ASIDE = re.compile(r"\([^()]*+\)")
_IN_WORDS = re.compile(r"[A-Za-z]{2}|[ie]\.[eg]\b|[\u4e00-\u9fff]")
_VERB = re.compile(r"(?<=\s)(?:is|are|was|were|equals?)\b:?")
DECISIONS = 50  # decisions that are tried, from the end


def _outside(clean: str, numbers: Sequence[Quantity], begin: int = 0) -> list[Quantity]:
    """Numbers that are not in brackets with words."""
    asides = [aside.span() for aside in _ASIDE.finditer(clean, begin) if _IN_WORDS.search(aside[0])]
    starts = [start for start, _ in asides]
    places = [bisect_right(starts, number.start) - 1 for number in numbers]
    return [
        number for number, place in zip(numbers, places, strict=True) if place < 0 or number.start >= asides[place][1]
    ]


_CONCLUSION = re.compile(
    r"\b(?:so|thus|therefore|hence|means|total|leaving|leaves|altogether)\b|所以|因此|一共|\b(?:is|equals)[\s:]*+$"
)


_BEGIN = re.compile(r"^|(?<!\b[ie]\.[eg])[.!?]\s|[\n。！？]")


# A list as the reference: numbers between commas or "and", maybe in brackets or formulas, with units.
_LIST_MARK = re.compile(r"\s*+(?:,\s*+(?:and|or)\b|,|;|\band\b|\bor\b|和|或|、)\s*+")


def reference_numbers(answer: object) -> tuple[Quantity, ...]:
    """The number of a reference answer, or all numbers of a list.

    Raises UsageError if it contains no number.
    """
    text = _reference_text(answer)
    found = []
    for part in listed_in(text) or text.split(";"):
        clean = cleaned(part)
        numbers = quantities(clean)
        if len(numbers) > 1 and (listed := _listed(clean)):
            found += listed
        elif numbers and (value := calculated(clean)) is not None and value != numbers[0].value:
            found.append(Quantity(value, None if value.denominator > 1 else 0, False, 0, len(clean)))
        elif numbers:
            found.append(numbers[0] if _ABOUT.match(clean) else numbers[-1])
        elif word := spelled(clean, last=True):
            found.append(word)
    if not found:
        raise UsageError(f"answer = {answer!r}: contains no number; write a number, or use the grader exact_match")
    return tuple(found)


# The result of a division with remainder: "5 r 3".
_REMAINDER = re.compile(
    r"(?<![\d.,])(\d{1,9})\s*+(?:,\s*+)?(?:(?:with|and)\s++(?:(?:a|the)\s++)?)?"
    r"(?:[rR]\.?|[Rr]emainder|REMAINDER|[Rr]em\.?|余|\.{3,6}|…{1,2})\s*+(?:(?:of|is|=)\s*+)?(\d{1,9})(?![\d.]*\d)"
)


def _reference_text(answer: object) -> str:
    text = str(answer).rpartition("####")[2]
    box = last_box(text)
    return (box[1] if box else text).strip()


def _is_no_number(reference: str, units: Collection[str]) -> bool:
    """Whether a reference is a formula that is not one number ("16\\pi"), or a list of other things than numbers."""
    if items := listed_in(reference):
        return any(len(quantities(cleaned(item))) != 1 or _is_no_number(item, units) for item in items)
    clean = cleaned(reference)
    numbers = quantities(clean)
    if not numbers or _listed(clean) or ";" in reference:
        return False
    return settled(clean, numbers[0] if _ABOUT.match(clean) else numbers[-1], units, worked_out=True) is None


def _as_written(text: str) -> str:
    """A text for comparison letter by letter: without white space, quotes and styles."""
    return re.sub(r"[\s\"'`*]+", "", cleaned(text)).rstrip(".").casefold()


def _listed(clean: str) -> list[Quantity]:
    """The numbers of a list, if every part of the text is one number with at most a name and a unit; else []."""
    parts = [part for part in _LIST_MARK.split(clean.strip(" {}()[]\\")) if part and part.strip()]
    found = [quantities(part) for part in parts]
    single = all(len(numbers) == 1 and _ABOUT.match(part) for numbers, part in zip(found, parts, strict=True))
    return [numbers[0] for numbers in found] if single and len(parts) > 1 else []


def grade_number(text: str, answer: object, question: str = "") -> bool:
    """Whether the number that a text gives as its answer equals the reference.

    With several reference numbers, the text must give all of them: in the same order if semicolons separate them, in
    any order if commas or "and" do. A reference that is no number ("16\\pi") and no list of numbers must be written the
    same way. Raises UsageError if `answer` contains no number.
    """
    wanted, reference = reference_numbers(answer), _reference_text(answer)
    if divided := _REMAINDER.fullmatch(reference):
        found = [match.groups() for match in _REMAINDER.finditer(cleaned(_stated(own_answer(text))))]
        return bool(found) and found[-1] == divided.groups()
    units = units_of(str(answer), question) if question else EVERYDAY
    no_number = _is_no_number(reference, units)
    if (no_number or listed_in(reference)) and _as_written(_stated(own_answer(text))) == _as_written(reference):
        return True
    if no_number:
        return False
    if len(wanted) == 1:
        answered = answered_number(text, question, str(answer))
        readings = answered.readings if answered else ()
        same = [same_quantity(reading, wanted[0]) for reading in readings]
        return any(same) if all(same_quantity(reading, readings[0]) for reading in readings) else all(same)
    numbers = _answered_list(own_answer(text), len(wanted), units)
    if ";" in str(answer):
        return len(numbers) == len(wanted) and all(map(same_quantity, numbers, wanted))
    return matched(wanted, numbers, lambda one, other: same_quantity(other, one))


def _stated(text: str) -> str:
    """The last box, else the last decision, else the last sentence."""
    box, named = last_box(text), decisions(text)
    if box and named and named[-1].start >= box[0]:
        return box[1]
    return sentence(named[-1].text) if named else last_sentence(text)


def _answered_list(text: str, count: int, units: Collection[str]) -> Sequence[Quantity]:
    """The numbers, `count` if possible, that a text states as a list; [] if one of its formulas is not a number."""
    clean = re.sub(r"\\[{}]", " ", cleaned(_stated(text)))
    numbers, listed = quantities(clean), _listed(clean)
    if len(listed) == count != len(numbers):
        return listed  # "2,300" as two numbers
    found = [settled(clean, number, units) for number in numbers]
    plain = [number for number in found if number is not None and not number.bound]
    return plain if len(plain) == len(found) and not CONTINUED.search(clean) else []
