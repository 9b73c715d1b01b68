"""Numbers as people and models write them, read for evaluation: units, currency, percent, fractions, powers of ten.

What a reward compares is `answers.last_number`, which is simpler and stays as it is.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards.grading.extraction import Decision, decisions, last_box, last_sentence, own_answer, sentence


@dataclass(frozen=True)
class Quantity:
    """A number of a text. `decimals`: digits after its point, None for a fraction; `start`, `end`: its place in the
    cleaned text."""

    value: Fraction
    decimals: int | None
    percent: bool
    start: int
    end: int


_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "k": 1000, "百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_PLAIN = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!,?\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+"
_SIGN = r"(?:(?<![\d\w)\].])[-+])?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:(?P<whole>\d+)(?:\s+(?:and\s+)?|又))?(?<![\d./])(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/]|\.\d)"
    rf"|(?P<minus>{_SIGN})(?P<plain>{_PLAIN})(?:[eE](?P<power>[-+]?\d{{1,3}})(?![\w.]*\w))?",
    re.ASCII,
)
_AFTER = re.compile(
    r"\s*(?:(?P<percent>%|percent\b|per cent\b|percentage points?\b)|"
    r"(?P<scale>dozen\b|hundred\b|thousand\b|million\b|billion\b|trillion\b|百万|千万|百|千(?![米克瓦])|万|亿|(?<=\d)[kK]\b))"
)
_CLEANED: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)\b", ""),
        (r"\\begin\{[a-z*]+\}|\\end\{[a-z*]+\}|\\(?:quad|qquad)\b|\\\\", " "),
        (r"(?<=\d)(?:\{,\}|,?\\[,!;: ]\s?|[\u00a0\u202f\u2009\u2007~])(?=\d{3}(?!\d))", ""),
        (r"(?<=[$€£¥₹])\s?(\d{1,3}) (\d{3})(?: (\d{3}))?(?![\d,])", r"\1\2\3"),
        (r"(?<=[$€£¥₹])\s?(\d[\d,.]*)\s?M\b", r"\1 million"),
        (r"(?<=\d)['’_](?=\d{3}(?!\d))", ""),
        (r"\bRs\.?\s*(?=\d)", ""),
        (r"(?<![\d.])(\d+) dollars? and (\d{2}) cents?\b", r"\1.\2 dollars"),
        (r"(\d+)元(\d)角", r"\1.\2元"),
        (r"(?<![\d.:/])(\d+)(?::| : )(?!00\b)(\d+)(?![\d.:/]\d|\d|:)", r"\1/\2"),
        (r"\\%|％", "%"),
        (r"百分之\s*(\d+(?:\.\d+)?)", r"\1%"),
        (r"(?<!\d)(\d+)\s*分之\s*(\d+)", r"\2/\1"),
        (r"(?<=\d)[*]{2}(?=\d)", "^"),
        (r"\*\*|__|\\[()\[\]$]|[$€£¥₹￥]|\\(?:pounds|euro)\b", ""),
        (r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname|textit|rm|bf)\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<=\d)\s*\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*\{\s*(-?)\s*([\d.]+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1\2/\3"),
        (r"(?<=\d)\s*\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\1/\2"),
        (r"\\[dtc]?frac\s*(\d)\s*\{\s*(\d+)\s*\}|\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*(\d)", r"\1\3/\2\4"),
        (r"(?<![\d.])([\d.]+)\s*(?:\\times|\\cdot|[×·*xX])\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})(?:\s*\})?(?!\d)", r"\1e\2"),
        (r"(?<![\d.])10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))(?!\d)", r"1e\1\2"),
        (r"\b(?:[Nn]egative|[Mm]inus)\s+(?=[\d.])|负\s*(?=\d)", "-"),
        (r"\b(\d{1,2}):00\b", r"\1"),
        (r"(?<![\d\w)])[–—](?=\d)|^\s*–\s+(?=\d)", "-"),
    )
]  # fmt: skip


def cleaned(text: str) -> str:
    """A text in which numbers are written in one way: LaTeX, full-width digits, signs and powers of ten as in ASCII."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPT) + "}", text)
    text = re.sub("(?<=\\d)[½¼¾⅓⅔]", lambda found: " " + found[0], text)
    text = _SHARE.sub(_share, text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("−", "-").replace("﹣", "-")
    for pattern, other in _CLEANED:
        text = pattern.sub(other, text)
    return text


def _share(found: re.Match[str]) -> str:
    """五分之三 as 3/5, 百分之四十 as 40%."""
    under, over = found[1], chinese_number(found[2])
    return f"{over}%" if under == "百" else f"{over}/{chinese_number(under)}"


# What makes a number after it an exponent, or part of a unit: "m^2", "10^{3", "cm2".
_POWER = re.compile(r"\^\s*\{?\s*$|(?<![A-Za-z])(?:[cmkd]?m|ft|yd)$")


def quantities(clean: str) -> list[Quantity]:
    """All numbers of a cleaned text but exponents. Those that cannot be (1/0, thousands of digits) are none."""
    found = []
    for number in _NUMBER.finditer(clean):
        if _POWER.search(clean, max(0, number.start() - 8), number.start()):
            continue
        try:
            value, decimals = _value(number)
        except (ZeroDivisionError, ValueError):
            continue
        after, end = _AFTER.match(clean, number.end()), number.end()
        percent = bool(after and after["percent"])
        if after:
            end = after.end()
            if after["scale"]:
                value *= _SCALES[after["scale"].lower()]
        found.append(Quantity(value, decimals, percent, number.start(), end))
    return found


def _value(number: re.Match[str]) -> tuple[Fraction, int | None]:
    if number["over"] is not None:
        part = Fraction(int(number["over"]), int(number["under"]))
        value = int(number["whole"] or 0) + part
        return (-value if number["sign"] == "-" else value), None
    digits = number["plain"].replace(",", "")
    value = Fraction(digits) * Fraction(10) ** int(number["power"] or 0)
    decimals = max(0, len(digits.partition(".")[2]) - int(number["power"] or 0))
    return (-value if number["minus"] == "-" else value), decimals


_DIGITS = {each: place for place, each in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_NUMERALS = "[零〇一二两三四五六七八九十百千万亿]{1,24}"
_CHINESE = re.compile(f"负?{_NUMERALS}")
_SHARE = re.compile(f"({_NUMERALS})分之({_NUMERALS})")
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {each: place for place, each in enumerate(_ONES)} | {each: 10 * n for n, each in enumerate(_TENS, start=2)}
_ENGLISH = re.compile(
    r"\b(?:{0})(?:(?:[\s-]+(?:and\s+)?)(?:{0}|hundred|thousand|million))*\b".format("|".join(_WORDS)), re.IGNORECASE
)


def chinese_number(text: str) -> int | None:
    """十八 is 18, 一百零五 is 105, 三万 is 30000; None for what is no number."""
    total = part = digit = 0
    for letter in text.removeprefix("负"):
        if letter in _DIGITS:
            digit = 10 * digit + _DIGITS[letter]
        elif letter in _UNITS:
            part += (digit or 1) * _UNITS[letter]
            digit = 0
        elif letter in "万亿":
            total = (total + part + digit) * (10**4 if letter == "万" else 10**8)
            part = digit = 0
        else:
            return None
    value = total + part + digit
    return -value if text.startswith("负") else value


def english_number(words: str) -> int:
    """ "one hundred and five" is 105."""
    total = part = 0
    for word in re.split(r"[\s-]+", words.lower()):
        if word == "hundred":
            part = (part or 1) * 100
        elif word in ("thousand", "million"):
            total, part = total + (part or 1) * _SCALES[word], 0
        elif word != "and":
            part += _WORDS[word]
    return total + part


def spelled(clean: str, last: bool) -> Quantity | None:
    """A number in words: the first of a text that begins with one, or the last."""
    for pattern, read in ((_CHINESE, chinese_number), (_ENGLISH, english_number)):
        found = list(pattern.finditer(clean)) if last else [each] if (each := pattern.match(clean.lstrip())) else []
        if found:
            value = read(found[-1][0])
            if value is not None:
                return Quantity(Fraction(value), 0, False, found[-1].start(), found[-1].end())
    return None


def same_quantity(found: Quantity, wanted: Quantity) -> bool:
    """Whether two numbers are the same: exactly, as a rounding to three or more decimals of one that does not end
    (2/3 and 0.667), or a percentage beside the number or the share that it is (40% and 40 or 0.4)."""
    if found.percent == wanted.percent:
        return _close(found.value, found.decimals, wanted.value, wanted.decimals)
    share, other = (found, wanted) if found.percent else (wanted, found)
    part = None if share.decimals is None else share.decimals + 2
    return _close(share.value / 100, part, other.value, other.decimals) or (
        abs(share.value) > 1 and _close(share.value, share.decimals, other.value, other.decimals)
    )


def _close(first: Fraction, first_decimals: int | None, second: Fraction, second_decimals: int | None) -> bool:
    if first == second:
        return True
    if first.denominator == second.denominator == 1:
        return False
    difference = abs(first - second)
    if difference <= max(abs(first), abs(second)) / 10**9:
        return True
    return _rounds(first, first_decimals, second_decimals, difference) or _rounds(
        second, second_decimals, first_decimals, difference
    )


def _rounds(exact: Fraction, written: int | None, decimals: int | None, difference: Fraction) -> bool:
    """Whether a number with so many decimals can be `exact`, which does not end, rounded or cut."""
    if decimals is None or decimals < 2 or not _endless(exact, written) or (written or decimals + 1) <= decimals:
        return False
    unit = Fraction(1, 10**decimals)
    return (decimals >= 3 and difference < unit) or (difference <= unit / 2 and difference <= abs(exact) / 10**4)


def _endless(value: Fraction, decimals: int | None) -> bool:
    """Whether a number has to be rounded when it is written: a fraction like 2/3, or one with five or more decimals."""
    if decimals is not None:
        return decimals >= 5
    under = value.denominator
    for prime in (2, 5):
        while under % prime == 0:
            under //= prime
    return under > 1


@dataclass(frozen=True)
class Answered:
    """The number that a text answers: one, or several that it leaves open ("3 or 4"); by which rule it was found."""

    readings: tuple[Quantity, ...]
    text: str
    rule: str
    bound: bool = False  # "less than 13", which is no answer unless a bound was asked for


_ABOUT = re.compile(
    r"[\s:：]*(?:(?:either|approximately|about|around|exactly|only|just|equal to|roughly|a total of|USD|Rs\.?|is|are|"
    r"大约|约|共|一共|总共|[A-Za-z](?:_\{?\w+\}?)?\s*[=:])\s*)*[\s(\[{]*(?=[-+]?[\d.])"
)
_OR = re.compile(
    r"\s*(?:[A-Za-z%]+\s+){0,2}(?:or|to|或者?|到)\s+(?=[-+]?[\d.])|\s*-\s*(?=\d)"
    r"|\s*(?:hours?|hrs?|h|days?|weeks?|years?|feet|ft|pounds?|lbs?|小时|天|年)(?:,?\s*and|,)?\s*"
    r"(?=[\d.]+\s*(?:minutes?|mins?|seconds?|hours?|days?|months?|inch|ounces?|分|秒|个月))"
)
_SPACED = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d,])")
_SPACED_ZEROS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})* 000(?![\d,])")


def read_decision(decision: Decision) -> tuple[Quantity, ...]:
    """The number that a decision names; several where it leaves it open; none where it names none."""
    clean = cleaned(decision.text)
    if decision.rule in ("tags", "boxed"):
        return _whole(clean)
    clean = _SPECIFIED.sub("", sentence(clean))
    clean = _SPACED.sub(lambda found: found[0].replace(" ", ""), clean, count=1) if _ABOUT.match(clean) else clean
    numbers = quantities(clean)
    begins = _ABOUT.match(clean)
    if not numbers:
        word = spelled(clean, last=False)
        return (word,) if word else ()
    if _UNKNOWN.search(clean):
        return _open(numbers[0])
    if between := _BETWEEN.match(clean):
        return tuple(each for each in numbers if each.start >= between.end())[:2]
    if decision.rule in ("label", "####") and not begins:
        inside = [each.span() for each in _ASIDE.finditer(clean)]
        outside = [each for each in numbers if not any(left <= each.start < right for left, right in inside)]
        return (outside[0],) if len(outside) == 1 and decision.rule == "label" and len(clean) < 80 else ()
    if not begins:
        return (_result(clean, numbers),)
    if worked := _WORKED_OUT.match(clean, begins.end()):
        return (next(each for each in numbers if each.end >= worked.end()),)
    chained = _chained(clean, begins.end(), numbers)
    if decision.rule == "label" and chained is numbers[0] and _operator(clean, chained.end):
        return ()
    if chained is numbers[0] and (_operator(clean, chained.end) or _RAISED.match(clean, chained.end)):
        value = _calculated(clean[begins.end() :])
        worth = numbers[-1] if value is None else Quantity(value, None, False, 0, 0)
        if _operator(clean, chained.end):  # a sum that is not worked out is no answer
            return (chained, worth)
        if value is not None:
            return (worth,)
    return _alternatives(clean, chained, numbers)


# What has a letter to be solved for, or an error: "13x", "x + 13", "13 ± 2".
_UNKNOWN = re.compile(
    r"^\s*(?:-?\s*[a-z]\s*[-+*/]\s*\d|[-+]?[\d.,]+(?:[xyz]\b|\s*[-+*/]\s*[xyz]\b)(?!\s*=)|[-+]?[\d.,]+\s*(?:±|\\pm\b))"
)
_BETWEEN = re.compile(r"\s*(?:somewhere )?between (?=[^a-z]*\d[^a-z]*\band\b)")
_BOUND = re.compile(
    r"\b(?:(?:less|more|fewer|greater|larger|smaller|higher|lower) than|at (?:least|most)|no (?:more|less|fewer) than|"
    r"up to|minimum|maximum|least|most|above|below|over|under)\b|至少|至多|最多|最少|大于|小于|超过|不到"
)
_BOUNDED = re.compile(
    r"[\s:*]*(?:is |strictly |clearly )?"
    r"(?:(?:less|more|fewer|greater|larger|smaller|higher|lower) than|at (?:least|most)|"
    r"no (?:more|less|fewer) than)\b(?!\s+or equal)"
)
_SPECIFIED = re.compile(r"[,，]\s*其中.*$")
_RAISED = re.compile(r"\s*\^\s*\{?\d")
# "1/3 of 54, which is 18": a sum and what it comes to.
_WORKED_OUT = re.compile(
    r"[-+]?[\d.,/]+\s*(?:[-+*/×÷]|of|plus|minus|times|divided by|multiplied by)\s*[\d.][^=;()]{0,40}?"
    r"(?:,\s*|\s)(?:which (?:is|equals|gives|makes|comes to)|i\.e\.,?|that is,?|so|or|equals|is)\s+"
    r"(?:[a-z]+\s+){0,2}[-+]?[\d.,/]*\d"
)


def _open(number: Quantity) -> tuple[Quantity, ...]:
    """Readings of which no number is all: an answer that is no number yet."""
    return number, replace(number, value=number.value + 1)


def _whole(clean: str) -> tuple[Quantity, ...]:
    """The number of a box or of tags: what its last equation gives, a sum that it leaves undone, or its only one."""
    clean = _SPACED.sub(lambda found: found[0].replace(" ", ""), clean.strip())
    clean = re.split(r"=|\\approx|≈", clean)[-1] if re.search(r"(?:=|\\approx|≈)\s*\S", clean) else clean
    numbers = quantities(clean)
    if not numbers:
        word = spelled(clean, last=False)
        return (word,) if word else ()
    if len(numbers) > 1 or re.search(r"[-+*/×÷^]|\\(?:times|cdot|div)", clean):
        value = _calculated(clean)
        if value is not None:
            return (Quantity(value, None, False, 0, len(clean)),)
    begins = _ABOUT.match(clean)
    if begins and len(numbers) > 1:
        return _alternatives(clean, numbers[0], numbers)
    return (numbers[0],) if begins else (numbers[-1],)


def _chained(clean: str, start: int, numbers: Sequence[Quantity]) -> Quantity:
    """Of "3 + 4 = 7 apples" the 7, of "7 apples in 3 days" the 7."""
    part = re.split(r"[(（;]|, | since | because | as | which | for ", clean[start:])[0]
    equals = [found.end() for found in re.finditer(r"=|\\approx|≈", part)]
    if not equals:
        return numbers[0]
    after = [each for each in numbers if each.start >= start + equals[-1]]
    if not after:
        return numbers[0]
    if _operator(clean, after[0].end) and _calculated(part[equals[-1] - start :]) == numbers[0].value:
        return numbers[0]  # "18 = 2 * 9"
    return after[0]


def _operator(clean: str, end: int) -> bool:
    return bool(re.match(r"\s*(?:[-+*/×÷]|\\times|\\cdot|\\div)", clean[end:]))


def _alternatives(clean: str, first: Quantity, numbers: Sequence[Quantity]) -> tuple[Quantity, ...]:
    found = [first]
    while (other := _OR.match(clean, found[-1].end)) is not None:
        after = [each for each in numbers if each.start >= other.end() - 1]
        if not after:
            break
        found.append(after[0])
    return tuple(found)


def _result(clean: str, numbers: Sequence[Quantity]) -> Quantity:
    """Of a sentence that does not begin with its number: what its last equation gives, or its last number."""
    after = [each for each in numbers if "=" in clean and each.start >= clean.rindex("=")]
    return after[0] if after else numbers[-1]


def _calculated(clean: str) -> Fraction | None:
    """The value of a sum like "3 * (4 + 5)", with powers up to the ninth; None for anything else."""
    written = re.sub(r"\\times|\\cdot|×", "*", re.sub(r"\\div|÷", "/", clean)).replace(",", "").strip(" .")
    written = re.sub(r"\^\s*(?:\{(\d)\}|(\d))(?!\d)", r"**\1\2", written)
    if len(written) > 60 or not re.fullmatch(r"[\d\s+\-*/().]+", written) or "//" in written:
        return None
    try:
        return _evaluated(ast.parse(written.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.AST) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(str(value))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluated(inner)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluated(left) + _evaluated(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _evaluated(left) - _evaluated(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _evaluated(left) * _evaluated(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _evaluated(left) / _evaluated(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if power < 10:
            return _evaluated(left) ** power
    raise ValueError("not a sum")


def answered_number(text: str, question: str = "") -> Answered | None:
    """The number that a text answers; None where it names none.

    The last decision counts that names a number ("the answer is 18", a box, "#### 18"), else the last number of the
    text. A last number that only repeats the question gives way to the last computed one of the same sentence.
    """
    text = own_answer(text)
    box = last_box(text)
    for decision in reversed(decisions(text)):
        shown = box[1] if box and decision.rule == "boxed" and decision.start >= box[0] else decision.text
        if decision.rule == "label" and _goes_on(text, decision):
            continue
        if readings := read_decision(decision._replace(text=shown)):
            return Answered(readings, decision.text[:200], decision.rule, bool(_BOUNDED.match(decision.text)))
    clean = _SPACED_ZEROS.sub(lambda found: found[0].replace(" ", ""), cleaned(text))
    written = quantities(clean)
    numbers = [each for each in written if not _DENIED.search(clean, max(0, each.start - 40), each.start)]
    if written and not numbers:
        return None
    if numbers:
        chosen = _computed(clean, numbers, question)
        return Answered((chosen,), clean[chosen.start : chosen.end], "last number")
    word = spelled(last_sentence(clean), last=True)
    return Answered((word,), last_sentence(clean)[:200], "last number") if word else None


# What a number is said not to be, or only supposed to be: "the answer is not 18", "it's 18, not 20".
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot be|(?:wrong|incorrect) answer is|answer (?:could|might|may) be)|n't(?: be)?|不是|不等于)"
    r"\s*(?:equal to |exactly |simply |just )?$",
    re.IGNORECASE,
)


def _goes_on(text: str, decision: Decision) -> bool:
    """Whether "Answer:" only begins a text that calculates on."""
    begun = sentence(decision.text)
    return "=" in begun and "=" in text[decision.start + len(begun) :]


def _computed(clean: str, numbers: Sequence[Quantity], question: str) -> Quantity:
    """What a text without a decision ends with: the last result of an equation in the sentence of its last number,
    else that number.

    Words in brackets do not count ("12 fruits (9 apples and 3 pears)"). Where the number only repeats the question, the
    only other one of the sentence that does not is meant ("so he makes 18 dollars from the 16 eggs").
    """
    last = numbers[-1]
    begin = max(found.end() for found in _BEGIN.finditer(clean, 0, last.start))
    inside = [each.span() for each in _ASIDE.finditer(clean, begin)]
    within = [each for each in numbers if each.start >= begin]
    outside = [each for each in within if not any(left <= each.start < right for left, right in inside)]
    last = outside[-1] if outside else last
    equals = clean.rfind("=", begin, last.start)
    result = next((each for each in within if each.start > equals >= 0), None)
    if result is not None and not _CONCLUSION.search(clean, result.end, last.start):
        return result
    asked = {each.value for each in quantities(cleaned(question))}
    new = {each.value: each for each in outside if each.value not in asked}
    return next(iter(new.values())) if last.value in asked and len(new) == 1 else last


_ASIDE = re.compile(r"\([^()]*(?:[A-Za-z]{2}|[\u4e00-\u9fff])[^()]*\)")
_CONCLUSION = re.compile(r"\b(?:so|thus|therefore|hence|means|total|leaving|leaves|altogether)\b|所以|因此|一共")
_BEGIN = re.compile(r"^|[.!?]\s|[\n。！？]")


def reference_numbers(answer: object) -> tuple[Quantity, ...]:
    """The number of a reference answer, or several where semicolons part them. Raises UsageError for none."""
    text = str(answer).rpartition("####")[2]
    if box := last_box(text):
        text = box[1]
    found = []
    for part in text.split(";"):
        clean = cleaned(part)
        numbers = quantities(clean)
        if numbers:
            found.append(numbers[0] if _ABOUT.match(clean) else numbers[-1])
        elif word := spelled(clean, last=True):
            found.append(word)
    if not found:
        raise UsageError(f"answer = {answer!r}: holds no number; write a number, or take the grader exact_match")
    return tuple(found)


def grade_number(text: str, answer: object, columns: Mapping[str, Any]) -> bool:
    """Whether the number that a text answers is that of the reference."""
    wanted = reference_numbers(answer)
    answered = answered_number(text, str(columns.get("question", "")))
    if answered is None:
        return False
    if len(wanted) == 1:
        if answered.bound and not _BOUND.search(f"{answer} {columns.get('question', '')}"):
            return False
        readings = answered.readings
        same = [same_quantity(each, wanted[0]) for each in readings]
        return any(same) if all(same_quantity(each, readings[0]) for each in readings) else all(same)
    named = decisions(own_answer(text))
    clean = cleaned(named[-1].text if named else last_sentence(text))
    numbers = quantities(clean)
    return len(numbers) == len(wanted) and all(map(same_quantity, numbers, wanted))
