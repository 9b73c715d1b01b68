"""Find where a text states its answer: boxes, tags, "the answer is", "####".

If a text states several answers, the last one counts. Questions that the text goes on to ask itself (as base models do
after few-shot examples) are not part of its answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from gruppo.data.boxes import LONGEST, Box, boxes

Rule = Literal["tags", "boxed", "answer is", "label", "####"]


class Decision(NamedTuple):
    """A place where a text states its answer. `text`: the stated answer; `start`: its index in the whole text."""

    rule: Rule
    text: str
    start: int


_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)


_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:\*\*|#+ )?(?:Question|Problem|Q|Human|User|Instruction|问题|题目)(?: ?\d+)?(?:\*\*)? ?[:：]"
)


_WRAPPED = r"[\s*_$~]*"


_KIND = r"(?:(?:final|correct|right|best|numerical|ultimate)\s{1,9}+){0,3}"


_ASKED = r"(?:\s+(?:to|for|of|in)\s[^.\n:=$]{1,80}?)?"


_SAYS = re.compile(
    rf"\b{_KIND}(?:answers?|(?:correct|right|best) (?:choice|option|one))\b{_ASKED}(?:\*\*)?(?:\s*+,)?\s++"
    r"(?:is|are|was|equals|would be|should be|must be|comes out to be)\b(?:\s+(?:therefore|thus|then|simply|just))?"
    r"\s*[:：]?",
    re.IGNORECASE,
)


_SAYS_CHINESE = re.compile(r"(?:答案|最终结果)(?:应该|应当|应|就)?(?:是|为|等于)[:：]?")


# "Answer:" counts at the start of a line or sentence; "to check our answer:" does not.
_LABEL = re.compile(
    rf"(?:^|[.!?] |(?<=\bthe )|(?<=\bThe ))[ \t*_#>(-]*+(?i:(?:my |our |the )?{_KIND}answer)[ \t*_]*+[:：=][*_]*+"
    r"|答案?[*_]*[:：][*_]*|【答案】[:：]?|[\"'](?i:(?:final_)?answer)[\"']\s*:\s*[\"']?",
    re.MULTILINE,
)


# A change of mind after an answer: "No, it's 14.", "Wait, actually B.", "I first thought …, but it is B."
_DOUBT = (
    r"(?:no|wait|actually|correction|hmm+|oops|sorry|scratch that|on second thought|"
    r"let me (?:re-?|double-?)?(?:check|compute|calculate|count)[^.\n]{0,60})"
)


_IT_IS = (
    r"(?:it|that|this|the (?:correct|right|real|actual) (?:one|value|number|choice|option))"
    r"(?:['’]s| is| was| should be| must be)(?: actually| really)? "
)


_VALUE = r"(?=[*_\"'($\[]*(?:(?:option|choice) )?[($]?(?:[-+−]?\d|[A-J]\b|\\(?:frac|sqrt|boxed)))"


_REVISED = re.compile(
    rf"(?<=[.!?,;:—–\n])\s{{0,9}}+(?:(?:but|so|and) )?(?:\b{_DOUBT}\b[\s,.:;!—–-]{{0,9}}+){{1,4}}"
    rf"(?:[^\n]{{0,120}}?\b{_IT_IS})?{_VALUE}"
    rf"|\b(?:thought|believed|guessed|assumed)\b[^.\n]{{1,60}}?\bbut (?:actually |now )?{_IT_IS}{_VALUE}",
    re.IGNORECASE,
)


_BEHIND = 300  # maximum characters between an answer and a change of mind about it


_HEADING = re.compile(r"^#+\s*(?i:(?:final )?answer|最终答案|答案)\s*$", re.MULTILINE)


_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*")


_NEGATED = re.compile(r"\s*(?:not|n't|wrong|incorrect|correct\b|right\b|in\b|unclear|unknown|不)", re.IGNORECASE)


_SUPPOSED = re.compile(
    r"\b(?:if|whether|suppose|assume|assuming|unless)\s+(?:that\s+)?(?:the\s+|my\s+)?$", re.IGNORECASE
)


_WRONG = re.compile(r"\b(?:wrong|incorrect|false)\s+$", re.IGNORECASE)


_NUMBERED = re.compile(r"\d+[.)、]\s+\S")


_LONGEST = 1000  # maximum characters of a line that states an answer


_SENTENCE_END = re.compile(r"(?<!\b[ie]\.[eg])[.!?](?=[\s*]|$)|[。！？\n]")


_SKIPPED = re.compile(r"[\s:：*]*+")


def own_answer(text: str) -> str:
    """The answer part of a text: without reasoning before </think>, and without questions that follow its decision.

    If nothing follows </think>, the reasoning is kept.
    """
    answered = _THOUGHT.split(text)[-1]
    text = answered if answered.strip() else text
    asked = [found.start() for found in _NEXT_QUESTION.finditer(text)]
    if not asked:
        return text
    ends = (
        decision.start + (len(decision.text) if decision.rule in ("tags", "boxed") else 1)
        for decision in _decisions(text)
    )
    decided = min(ends, default=len(text))
    return text[: next((place for place in asked if place >= decided), len(text))]


def tags(text: str) -> list[Box]:
    """Every <answer>…</answer> that is closed and not empty; `content` without white space around it."""
    found, opened = [], None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag if opened is None else opened
        elif opened is not None:
            if content := text[opened.end() : tag.start()][:LONGEST].strip():
                found.append(Box(opened.end(), tag.start(), content))
            opened = None
    return found


def decisions(text: str) -> list[Decision]:
    """All decisions of a text in order of position; at equal positions, tags and boxes come last.

    Decisions by other rules inside a box are left out.
    """
    inside = [(box.start, box.end) for box in boxes(text)]
    found = [item for item in _decisions(text) if item.rule == "boxed" or not _is_within(item.start, inside)]
    return sorted(found, key=lambda item: (item.start, item.rule in ("tags", "boxed")))


def _is_within(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether `place` lies in one of the sorted spans. Spans of boxes inside boxes do not matter."""
    before = bisect_left(spans, (place, 0)) - 1
    return before >= 0 and place < spans[before][1]


def _decisions(text: str) -> Iterator[Decision]:
    for tagged in tags(text):
        yield Decision("tags", tagged.content, tagged.start)
    for box in boxes(text):
        yield Decision("boxed", box.content, box.start)
    for said in (*_SAYS.finditer(text), *_SAYS_CHINESE.finditer(text)):
        supposed = _SUPPOSED.search(text, max(0, said.start() - 20), said.start())
        wrong = _WRONG.search(text, max(0, said.start() - 12), said.start())
        if not supposed and not wrong and not _NEGATED.match(text, said.end()):
            yield from _following("answer is", text, said.end())
    for label in (*_LABEL.finditer(text), *_HEADING.finditer(text)):
        yield from _following("label", text, label.end())
    yield from _revised(text)
    for hashes in _HASHES.finditer(text):
        line = text[hashes.end() : hashes.end() + _LONGEST].split("\n", 1)[0]
        if line.strip() and not _NUMBERED.match(line):
            yield Decision("####", line.strip(), hashes.end())


def _revised(text: str) -> Iterator[Decision]:
    """Answers that a text changes its mind to within `_BEHIND` characters after it stated one."""
    stated = sorted(match.end() for pattern in (_SAYS, _LABEL) for match in pattern.finditer(text))
    for revised in _REVISED.finditer(text) if stated else ():
        before = bisect_left(stated, revised.end()) - 1
        if before >= 0 and revised.end() - stated[before] <= _BEHIND:
            yield from _following("answer is", text, revised.end())


def _following(rule: Rule, text: str, start: int) -> Iterator[Decision]:
    """The answer after words like "the answer is": the rest of the line, or the next non-blank line."""
    skipped = _SKIPPED.match(text, start)
    assert skipped
    start = skipped.end()
    span = display(text, start) or text[start : start + _LONGEST].split("\n", 1)[0].strip()
    if span:
        yield Decision(rule, span, start)


def display(text: str, start: int) -> str:
    """The displayed formula that begins at `start`, to the end of its last line; "" if none does."""
    for opening, closing in (("$$", "$$"), ("\\[", "\\]"), ("\\begin", "\\end")):
        if text.startswith(opening, start):
            end = text.find(closing, start + len(opening), start + LONGEST)
            if end < 0:
                return ""
            line = text.find("\n", end, end + _LONGEST)
            return text[start : line if line >= 0 else end + _LONGEST].strip()
    return ""


def sentence(text: str) -> str:
    """The first sentence or line of a text, without its end mark."""
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def last_sentence(text: str) -> str:
    """The last sentence or line with any content; "" if there is none."""
    return next((part for part in reversed(_SENTENCE_END.split(text)) if part.strip(" *_$")), "")
