"""Times of day: "4:30 p.m.", 16:30, "half past four in the afternoon", "16.30 Uhr", 下午4点半."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from gruppo.data.boxes import boxes, last_box
from gruppo.rewards.grading.digits import ascii_digits
from gruppo.rewards.grading.extraction import decisions, own_answer, sentence

_HALF_DAY = 12 * 3600


class Time(NamedTuple):
    """A time of day.

    `seconds` from midnight. `sure`: whether the half of the day is known (a.m., p.m., 16:30). `by_24`: whether it is
    written with 24 hours. `start`, `end`: its span in the plain text.
    """

    seconds: int
    sure: bool
    by_24: bool
    start: int
    end: int


_HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


_HOUR = rf"(?:\d{{1,2}}|{'|'.join(_HOURS)})"


_HALVES = (
    r"(?:\s?(?P<half>[ap])m\b|\s?(?:,\s?)?(?P<part>in the (?:early |late )?(?:morning|afternoon|evening)|at night|"
    r"noon\b|midnight\b))"
)


_CHINESE_HALVES = {
    "凌晨": "a",
    "早上": "a",
    "早晨": "a",
    "上午": "a",
    "中午": "noon",
    "下午": "p",
    "傍晚": "p",
    "晚上": "p",
}


_TIME = re.compile(
    rf"(?<![\d.:/a-z])(?:(?P<past>half|quarter|a quarter)\s(?P<side>past|to)\s(?P<hour_past>{_HOUR})\b(?:\so'?clock)?"
    rf"|(?P<hour>\d{{1,2}})\s?[:h]\s?(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?(?![\d:/]|\.\d)(?:\suhr\b)?"
    rf"|(?P<hour_point>\d{{1,2}})\.(?P<minute_point>[0-5]\d)(?=\s?[ap]m\b)"
    rf"|(?P<hour_clock>{_HOUR})\s?(?:o'?clock|uhr\b)"
    rf"|(?P<hour_alone>\d{{1,2}})"
    r"(?=\s?[ap]m\b|\s?(?:noon|midnight)\b|\sin the (?:morning|afternoon|evening)\b|\sat night\b))"
    rf"{_HALVES}?"
    rf"|(?P<chinese>{'|'.join(_CHINESE_HALVES)})?\s?(?<![\d.:])(?P<hour_chinese>\d{{1,2}})\s?[点时](?!间)"
    r"(?P<minute_chinese>半|一刻|三刻|\s?\d{1,2}\s?分?|整)?"
    r"|(?<!after)(?<!\w)(?P<word>noon|midnight)\b"
)


_CLEANED: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), other)
    for pattern, other in (
        (
            r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname|rm)\s*(?=\{)|\\(?:left|right)\b|[$*_]|\\[()\[\]]",
            " ",
        ),
        (r"\\(?:[,;: !]|q?quad\b)|~|[\u00a0\u2009\u202f]", " "),
        (r"\{\s*:\s*\}|：|\\colon\b", ":"),
        (r"[{}]", " "),
        (r"[’‘]", "'"),
        (r"\s+", " "),
        (rf"({'|'.join(_CHINESE_HALVES)}) ?(\d{{1,2}}):([0-5]\d)(?!\d)", r"\1\2点\3分"),
        (r"(?<![\d:.])(\d{1,2})\.([0-5]\d) ?uhr\b|(?<![\d:.])(\d{1,2}) ?uhr ([0-5]\d)(?!\d)", r"\1\3:\2\4 uhr"),
        (r"(?<=[\d\w]) ?\b([ap])\.? ?m\b\.?", r" \1m"),
        (r"(?<=\d)([ap])\.? ?m\b\.?", r" \1m"),
    )
]


def plain(text: str) -> str:
    """A text in lower case with ASCII digits, without LaTeX, and with "am" and "pm" in this spelling."""
    text = ascii_digits(text).lower()
    for pattern, other in _CLEANED:
        text = pattern.sub(other, text)
    return text.strip()


def times(clean: str) -> list[Time]:
    """All times of day in a plain text, in order."""
    found = (_time(match) for match in _TIME.finditer(clean))
    return [time for time in found if time is not None]


def _time(found: re.Match[str]) -> Time | None:
    def read(*names: str) -> str | None:
        return next((found[name] for name in names if found[name]), None)

    if found["word"]:
        return Time(_HALF_DAY if found["word"] == "noon" else 0, True, False, *found.span())
    written = read("hour", "hour_point", "hour_clock", "hour_alone", "hour_past", "hour_chinese") or ""
    hour = _HOURS.index(written) + 1 if written in _HOURS else int(written)
    minute = _minutes(found["minute_chinese"]) if found["minute_chinese"] else int(read("minute", "minute_point") or 0)
    if found["past"]:
        minute = 30 if found["past"] == "half" else 15
        minute, hour = (60 - minute, hour - 1) if found["side"] == "to" else (minute, hour)
        hour = hour or (12 if found["side"] == "to" else 0)
    if hour > 23 or minute > 59:
        return None
    half = _half(found, hour)
    seconds = hour * 3600 + minute * 60 + int(found["second"] or 0)
    if half is None or hour > 12 or hour == 0:
        by_24 = hour > 12 or hour == 0
        return None if by_24 and half == ("a" if hour else "p") else Time(seconds, by_24, by_24, *found.span())
    return Time(seconds % _HALF_DAY + (_HALF_DAY if half == "p" else 0), True, False, *found.span())


def _minutes(written: str) -> int:
    fixed = {"半": 30, "一刻": 15, "三刻": 45, "整": 0}
    return fixed[written] if written in fixed else int(re.sub(r"\D", "", written))


def _half(found: re.Match[str], hour: int) -> str | None:
    """ "a" or "p" for the half of the day that a time names; None if it names none."""
    if found["chinese"]:
        named = _CHINESE_HALVES[found["chinese"]]
        return (
            ("p" if hour in (12, 1, 2) else "a") if named == "noon" else "a" if hour == 12 and named == "p" else named
        )
    part = found["part"]
    if not part:
        return found["half"]
    if part in ("noon", "midnight"):
        return "p" if part == "noon" else "a"
    if part == "at night":
        return "p" if 6 <= hour < 12 else "a"
    return "a" if part.endswith("morning") else "p"


# Questions whose answer is a time although the reference has neither a.m. nor p.m., and those that rule it out.
_ASKED = re.compile(
    r"\bwhat (?:\w+ )?time\b|\bwhich time\b|\bo['’]?clock\b|\d ?[ap]\.? ?m\b|\bclock (?:show|read|say)s?\b"
    r"|\bwhen (?:will|would|does|did|do|should|must|can|is|was|are|were)\b|几点|什么时[候间]|何时|时刻"
)


_NOT_ASKED = re.compile(
    r"\bratio\b|\bproportion\b|\bscale\b|\bscore\b|\bodds\b|\bhow (?:long|much time|many)\b|比|多长时间"
)


_HALF_ASKED = re.compile(r"\ba\.?m\.?\s*(?:or|/|and)\s*p\.?m\b|上午还是下午")


_BETWEEN = re.compile(r"[\s,;.、和]*(?:(?:and|or|at)\b[\s,;]*)?")


def reference_times(answer: object, question: str = "") -> list[Time]:
    """The times of day that a reference answer consists of; [] if it is something else.

    A time without a.m., p.m. or the like ("3:30", "16:30") can be a ratio: it counts as a time only if the question
    asks for one.
    """
    text = str(answer).rpartition("####")[2]
    if box := last_box(text):
        text = box[1]
    clean = plain(text[:200])
    found = times(clean)
    rest = _BETWEEN.sub("", "\0".join(_outside(clean, found))).replace("\0", "")
    if not found or rest not in ("", "the"):
        return []
    asked = question.casefold()
    if all(time.sure and not time.by_24 for time in found) or _named(clean, found):
        return found
    return found if _ASKED.search(asked) and not _NOT_ASKED.search(asked) else []


def _named(clean: str, found: Sequence[Time]) -> bool:
    """Whether words say that all of these are times: "o'clock", "half past", "Uhr", 点."""
    return all(re.search(r"clock|past|quarter|uhr|[点时]", clean[time.start : time.end]) for time in found)


def _outside(clean: str, found: Sequence[Time]) -> list[str]:
    ends = [0, *(time.end for time in found)]
    starts = [*(time.start for time in found), len(clean)]
    return [clean[end:start] for end, start in zip(ends, starts, strict=True)]


def grade_time(text: str, answer: object, question: str = "") -> bool | None:
    """Whether a text answers with the times of the reference; None if the reference is not a time of day.

    a.m. or p.m. may be left out, unless the question asks for it or a time has 24 hours: 4:30 fits 4:30 p.m., but not
    16:30.
    """
    wanted = reference_times(answer, question)
    if not wanted:
        return None
    found = _answered(text, len(wanted))
    strict = bool(_HALF_ASKED.search(question.casefold()))
    return len(found) == len(wanted) and all(
        _same(time, reference, strict) for time, reference in zip(found, wanted, strict=True)
    )


def _same(answer: Time, wanted: Time, strict: bool) -> bool:
    if answer.sure == wanted.sure:
        return answer.seconds == wanted.seconds
    if strict or (wanted.by_24 and not answer.sure):
        return False
    return (answer.seconds - wanted.seconds) % _HALF_DAY == 0


def _answered(text: str, most: int) -> list[Time]:
    """The times that a text states as its answer, without repetitions; [] if it leaves them open."""
    text = own_answer(text)
    box = last_box(text)
    for decision in reversed(decisions(text)):
        whole = decision.rule in ("boxed", "tags")
        shown = box[1] if box and decision.rule == "boxed" and decision.start >= box[0] else decision.text
        if not whole and (inner := boxes(shown)):
            shown, whole = inner[-1].content, True
        clean = plain(shown) if whole else sentence(plain(shown))
        if found := _stated(clean, times(clean)):
            return _distinct(found) if whole else _first(clean, found, most)
        if re.search(r"\d", clean):
            return []
    for line in reversed(re.split(r"[.!?](?=\s)|[。！？\n]", _by_lines(text))):
        if found := _stated(line, times(line)):
            return _distinct(found) if most > 1 else _first(line, found[-1:], most) if not _open(line, found) else []
    return []


def _by_lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.split("\n"))


def _stated(clean: str, found: Sequence[Time]) -> list[Time]:
    """The times that the text does not deny ("not 4:30 pm")."""
    return [
        time
        for time in found
        if not re.search(r"\bnot (?:at )?$|n't (?:be )?$|不是$", clean[max(0, time.start - 20) : time.start])
    ]


def _first(clean: str, found: Sequence[Time], most: int) -> list[Time]:
    """The first times of a sentence, as many as the reference has; [] if it leaves the answer open."""
    return [] if most == 1 and _open(clean, found) else _distinct(found)[:most]


def _open(clean: str, found: Sequence[Time]) -> bool:
    """Whether a text names different times as alternatives: "4:30 or 5:30"."""
    return any(
        re.fullmatch(r",?\s*(?:or|或者?)\s*(?:at\s)?", clean[first.end : second.start])
        and not _same(first, second, strict=False)
        for first, second in pairwise(found)
    )


def _distinct(found: Sequence[Time]) -> list[Time]:
    """Times without those that repeat the one before in another way: "16:30 (4:30 pm)"."""
    kept: list[Time] = []
    for time in found:
        if kept and (time.seconds == kept[-1].seconds or (time.sure != kept[-1].sure and _same(time, kept[-1], False))):
            kept[-1] = time if time.sure else kept[-1]
        else:
            kept.append(time)
    return kept
