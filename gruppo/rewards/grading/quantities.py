"""Numbers in a text, with scales and units: digits, Chinese numerals, English words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gruppo.rewards.grading.digits import ascii_digits
from gruppo.rewards.grading.latex import braced
from gruppo.rewards.grading.rounding import decimals as places
from gruppo.rewards.grading.rounding import terminates


@dataclass(frozen=True)
class Quantity:
    """A number in a text.

    `value`: exact, scale words included. `decimals`: digits after the decimal point, None for a fraction.
    `percent`: whether a percent sign or word follows. `start`, `end`: its span in the cleaned text. `bound`: whether it
    only limits a number ("x > 5"), or its sign is open ("±5").
    """

    value: Fraction
    decimals: int | None
    percent: bool
    start: int
    end: int
    bound: bool = False


_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "k": 1000, "m": 10**6, "百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip


_PLAIN = r"(?:\d{1,3}(?:,\d{2,3}){0,8},\d{3}(?!,?\d)|\d++)(?:\.\d++)?|(?<![\d.])\.\d++"


_SIGN = r"(?:(?<![\d\w)\].])[-+])?"


_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:(?P<whole>\d++)(?:\s++(?:and\s++)?|又))?(?<![\d./])(?P<over>\d++)\s?/\s?(?P<under>\d+)(?![\d/]|\.\d)"
    rf"|(?P<minus>{_SIGN})(?P<plain>{_PLAIN})(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\.*+\w))?",
    re.ASCII,
)


_AFTER = re.compile(
    r"\s*(?:(?P<percent>%|percent\b|per cent\b|percentage points?\b)|"
    r"(?P<scale>dozen\b|hundred\b|thousand\b|million\b|billion\b|trillion\b|百万|千万|百|千(?![米克瓦卡焦帕赫伏])|万|亿|(?<=\d)[kKM]\b))"
)


_UPRIGHT = r"([^{}]*+(?:(?<=\^)\{\s?-?\d\s?\}[^{}]*+)*+)"  # upright text, maybe with exponents: "cm^{2}"


_UNIT_WORD = r"[A-Za-z]{1,12}(?:\s?\^\s?(?:\d|\{\d\}))?"


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
        (r"(?<!\d)(\d++)元(\d)角", r"\1.\2元"),
        (r"(?<![\d.:/])(\d+)(?::| : )(?!00\b)(\d+)(?![\d.:/]\d|\d|:)", r"\1/\2"),
        (r"\\%|％", "%"),
        (r"百分之\s*(\d+(?:\.\d+)?)", r"\1%"),
        (r"(?<!\d)(\d+)\s*分之\s*(\d+)", r"\2/\1"),
        (r"(?<=\d)[*]{2}(?=\d)", "^"),
        (r"(?<=\d)\.(?=\s?/\s?\d)", ""),
        (r"\*\*|__|\\[()\[\]$]|[$€£¥₹￥]|\\(?:pounds|euro)\b", ""),
        (r"~(?=\s*+[A-Za-z\\{}])", " "),
        (rf"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname|textit|rm|bf)\s*\{{{_UPRIGHT}\}}", r" \1 "),
        (rf"\\[dtc]?frac\s*\{{\s*({_UNIT_WORD})\s*\}}\s*\{{\s*({_UNIT_WORD})\s*\}}", r"\1/\2"),
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
    """The text with numbers in one notation: LaTeX, full-width digits, signs and powers of ten become plain ASCII."""
    text = braced(ascii_digits(text))
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPT) + "}", text)
    text = re.sub("[₀-₉]+", lambda found: "_{" + unicodedata.normalize("NFKC", found[0]) + "}", text)
    text = re.sub("[①-⒛⓪-⓾]{2,}", " ", text)  # a list of labels
    text = re.sub("(?<=\\d)[½¼¾⅓⅔]", lambda found: " " + found[0], text)
    text = _SHARE.sub(_share, text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("−", "-").replace("﹣", "-")
    for pattern, other in _CLEANED:
        text = pattern.sub(other, text)
    return text


def _share(match: re.Match[str]) -> str:
    """五分之三 as 3/5, 百分之四十 as 40%."""
    under, over = match[1], chinese_number(match[2])
    return f"{over}%" if under == "百" else f"{over}/{chinese_number(under)}"


# Text before a number that makes it an exponent or part of a unit: "m^2", "10^{3", "cm2".
_POWER = re.compile(r"\^\s*\{?\s*$|(?<![A-Za-z])(?:[cmkd]?m|ft|yd)$")


def quantities(clean: str) -> list[Quantity]:
    """All numbers of a cleaned text in order, except exponents. Skips 1/0 and numbers of thousands of digits."""
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


_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}


_UNITS = {"十": 10, "百": 100, "千": 1000}


_NUMERALS = "[零〇一二两三四五六七八九十百千万亿]{1,24}"


_CHINESE = re.compile(
    f"负?{_NUMERALS}(?<![十百千万亿]千)(?<![十百千零][一二三四五六七八九]千)"
)  # not the 千 of 六十千米


_SHARE = re.compile(f"({_NUMERALS})分之({_NUMERALS})")


_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip


_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


_WORDS = {word: value for value, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}


_ENGLISH = re.compile(
    r"(?:\bnegative\s|(?:(?<!\w\s)|(?<=\b(?:is|be)\s))\bminus\s)?\b(?:{0})(?:(?:[\s-]+(?:and\s+)?)(?:{0}|hundred|thousand|million)){{0,24}}\b".format(
        "|".join(_WORDS)
    ),
    re.IGNORECASE,
)


def chinese_number(text: str) -> int | None:
    """Value of a Chinese numeral: 十八 is 18, 一百零五 is 105, 三万 is 30000; None if the text is not a numeral."""
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
    """Value of a number in English words: "one hundred and five" is 105, "negative five" is -5. Raises KeyError for any
    other word.
    """
    total = part = 0
    first, *others = re.split(r"[\s-]+", words.lower())
    negative = first in ("negative", "minus")
    for word in others if negative else (first, *others):
        if word == "hundred":
            part = (part or 1) * 100
        elif word in ("thousand", "million"):
            total, part = total + (part or 1) * _SCALES[word], 0
        elif word != "and":
            part += _WORDS[word]
    return -(total + part) if negative else total + part


def spelled(clean: str, last: bool) -> Quantity | None:
    """A number in words: the one with which the text begins or, if `last`, the last one; None if there is none."""
    for pattern, read in ((_CHINESE, chinese_number), (_ENGLISH, english_number)):
        found = list(pattern.finditer(clean)) if last else [first] if (first := pattern.match(clean.lstrip())) else []
        if found:
            value = read(found[-1][0])
            if value is not None:
                return Quantity(Fraction(value), 0, False, found[-1].start(), found[-1].end())
    return None


def same_quantity(answer: Quantity, wanted: Quantity) -> bool:
    """Whether two numbers are the same.

    They are if they are equal; if both are decimals within 1e-9 (relative); if one is a rounding of the other, which
    does not terminate, to three or more decimals (2/3 and 0.667), or to two within 1e-4 (relative); or if one is a
    percentage and the other the same number or share (40% and 40 or 0.4). Zeros at the end of a decimal do not make it
    a rounding of a fraction (1.000 is not 4001/4000).
    """
    if answer.percent == wanted.percent:
        return _close(answer.value, answer.decimals, wanted.value, wanted.decimals)
    share, other = (answer, wanted) if answer.percent else (wanted, answer)
    part = None if share.decimals is None else share.decimals + 2
    return _close(share.value / 100, part, other.value, other.decimals) or (
        abs(share.value) > 1 and _close(share.value, share.decimals, other.value, other.decimals)
    )


def _close(first: Fraction, first_decimals: int | None, second: Fraction, second_decimals: int | None) -> bool:
    if first == second:
        return True
    difference = abs(first - second)
    if first_decimals and second_decimals and difference <= max(abs(first), abs(second)) / 10**9:
        return True
    return _rounds(first, first_decimals, second, second_decimals) or _rounds(
        second, second_decimals, first, first_decimals
    )


def _rounds(exact: Fraction, written: int | None, rounded: Fraction, decimals: int | None) -> bool:
    """Whether `rounded`, with `decimals` decimals, can be the non-terminating number `exact`, rounded or truncated."""
    if decimals and written is None:
        decimals = min(decimals, places(rounded))
    if decimals is None or decimals < 2 or not _endless(exact, written) or (written or decimals + 1) <= decimals:
        return False
    unit, difference = Fraction(1, 10**decimals), abs(exact - rounded)
    return (decimals >= 3 and difference < unit) or (difference <= unit / 2 and difference <= abs(exact) / 10**4)


def _endless(value: Fraction, decimals: int | None) -> bool:
    """Whether a number must be rounded when written: a fraction such as 2/3, or one with five or more decimals."""
    if decimals is not None:
        return decimals >= 5
    return not terminates(value)
