"""Multiple choice in sentences that weigh options: "for sure D, it can't be A", "not B but C", 不是A，而是B."""

from __future__ import annotations

import re
from typing import NamedTuple

from gruppo.data.options import Lettered, plain_text
from gruppo.rewards.grading.languages import DENIED

SENTENCES = 3  # last sentences that are read


LONGEST = 250  # characters of a sentence that is read


_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")


_ONE = r"(?:[(（]\s*+[A-J]\s*+[)）]|(?!I)[A-J])"


_MENTION = Lettered(
    rf"(?<![A-Za-z'’]){_ONE}(?:\s*+(?:,\s*+(?:and|or|nor)\b|[,，、/&和与或及]|\b(?:and|or|nor)\b)\s*+{_ONE}(?![A-Za-z'’\d]))*"
    r"(?![A-Za-z'’\d]|-[A-Za-z])"
)


# "A train", but not "A is", "A because".
_ARTICLE = re.compile(
    r"\s++(?!(?:because|since|as|is|isn|are|was|looks?|seems?|can|cannot|does|would|could|it|for|without|rather|instead|"
    r"over|which|with|and|or|by|not|but|definitely|works?|fits?)\b)[a-z]"
)


# After "D is": "the most common wrong answer", "just a distractor".
CALLED_WRONG = (
    r"(?:(?:definitely|clearly|also|certainly|probably|just|only|simply|merely|really)\s++)?(?:an?|the|one of the)\s++"
    r"(?:(?!(?:and|but|so|while|not|answer|choice|option)\b)[a-z]+\s++){0,4}?"
    r"(?:wrong|incorrect|false|distractors?|traps?|red herring|decoy|misconception|mistake)"
)


# What others choose, or might choose: "most students pick".
OTHERS = (
    r"(?:people|students|others|everyone|everybody|someone|no ?one|nobody|few|some|many|most|"
    r"(?:you|one) (?:might|may|could))(?: \w+){0,2}"
)


NO_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|can't|isn't|never|neither|nor|without|wrong|incorrect|false|rul(?:e|es|ed|ing) out|"
    r"eliminat(?:e|es|ed|ing)|exclud(?:e|es|ed|ing)|discard(?:s|ed|ing)?|reject(?:s|ed|ing)?|doubt|"
    r"except|at first|initially|thought|instead of|rather than|than|over|"
    r"(?:everything|anything|all|any|every option) but)\b|n['’]t\b"
    rf"|\b{OTHERS} (?:say|think|pick|choose|select|answer|guess|believe|go|go for)s?\b"
    r"|不是|不选|不会|不可能|不能|不应|不该|排除|而非|除了|并非)"
    r"(?:(?!\b(?:but|so|leaves?|leaving|thus|hence)\b|而是|就是|只能|所以|因此)[^,，;；:：]){0,30}$",
    re.IGNORECASE,
)


_NO_AFTER = re.compile(
    r"\s*+(?:选项|项)?\s*+(?:都|均|也|并|肯定|一定|显然)?(?:不|错|排除)"
    r"|\s++(?:(?:is|are|was|would be|must be|seems?|looks?)\s++)?(?:(?:both|all|clearly|definitely|also)\s++)*"
    r"(?:not|wrong|incorrect|false|impossible|out|tempting)\b"
    rf"|\s++(?:is|are|was|seems?|looks?)\s++{CALLED_WRONG}\b"
    r"|\s++(?:is|are|was|does|do|did|can|could|would|wo|ca)n?['’]t\b|\s++(?:does|do|can|could|would)\s*+not\b|\s++cannot\b",
    re.IGNORECASE,
)


# A denial between two letters that belongs to the second one: "C, not D", 选C不选D.
_OF_THE_NEXT = re.compile(r"[\s,，]*+(?:and|but|而|rather|instead)?\s*+(?:not|不是|不选|than|of)\s*+$", re.IGNORECASE)


_OPEN_BEFORE = re.compile(
    r"(?:\b(?:between|either|could be|may be|might be|maybe|perhaps|possibly)|在|可能是|也许是)\s*$", re.IGNORECASE
)


_IF_BEFORE = re.compile(r"\b(?:if|unless|whether|suppos(?:e|ing)|assum(?:e|ing))\b[^,，;；:：]{0,30}$", re.IGNORECASE)


_WOULD = re.compile(r"(?:\bwould|['’]d)\b[^,;:]{0,40}$")


_WOULD_AFTER = re.compile(r"[(（]?[A-Z][)）]?[\s…]*+would\b")


# "If I had to guess" supposes nothing.
_IF = r"\bif\b(?!,? (?:I|we|you)(?:['’]d)? (?:had|have|were) (?:to|forced)\b)"


_IF_AFTER = re.compile(rf"(?:(?!\b(?:because|since|so)\b)[^.!?;\n。]){{0,80}}?(?:{_IF}|\bunless\b)")


_IF_IT_WERE = re.compile(rf"(?i:{_IF})[^.;]{{0,80}}\b(?:were|weren['’]t|had|asked)\b")


_ENDS = re.compile(r"[.!?\n。！？]")


def supposed(before: str, said: str) -> bool:
    """Whether a choice depends on something untrue: "it would be C if x were 2", "if x were 2, it would be C".

    `before` and `said`: the characters before the letter, and those from it on; at most one or two sentences.
    """
    clause = _ENDS.split(before)[-1]
    if not _WOULD.search(clause) and not _WOULD_AFTER.match(said):
        return False
    return bool(_IF_AFTER.match(said) or _IF_IT_WERE.search(clause))


_YES_BEFORE = re.compile(
    r"(?:\b(?:definitely|surely|clearly|certainly|obviously|probably|for sure|without a doubt|no doubt|is|be|it['’]s|"
    r"i think|i believe|i guess|i['’]d say|i say|say|go with|choose|pick|leaves?|leaving|so|thus|hence|therefore|then|"
    r"but(?: rather)?|actually)|是|选了?|认为|一定|肯定|显然|只有|应为)[\s,:：]*$",
    re.IGNORECASE,
)


_YES_AFTER = re.compile(
    r",?\s*+(?:for sure|it is|definitely|certainly|without (?:a )?doubt|no doubt|is (?:right|correct|the|it\b)|"
    r"fits\b|works\b)"
    r"|\s*+(?:选项|项)?\s*+(?:才|就|肯定|一定|显然)?(?:是正确|是对|正确|对|符合)|\s*+(?:吧|无疑|莫属)",
    re.IGNORECASE,
)


# Several letters that are right together.
_ALL_AFTER = re.compile(r"\s++are (?:both|all)\b(?! (?:not|wrong|incorrect|false))|\s*+(?:选项)?都(?:对|是|正确|符合)")


# The beginning of a sentence or clause, where a letter is an option and not the name of something ("vitamin C").
_BEGINS = re.compile(
    r"(?:^|[,，;；:：]|\b(?:options?|choices?|answers?|letter|statements?|but|and|so|then|with)|选项|选|而|非)[\s\"'“(（]*$",
    re.IGNORECASE,
)


_ONE_OF_BOTH = re.compile(r"不是[^，。]{1,8}[，,]?\s*就是")


class Weighed(NamedTuple):
    """The options that sentences settle on, sorted, and the sentence that names them."""

    letters: str
    text: str


def weighed(text: str, letters: str) -> Weighed | None:
    """The only option that the last sentences of a text do not deny, or several that are right together; None if the
    sentences settle on none.

    An option counts if words affirm it ("definitely", "it is", 是), or if others are denied beside it.
    """
    plain = plain_text(text[-SENTENCES * LONGEST :], letters)
    read = [found[0].strip() for found in _SENTENCE.finditer(plain) if found[0].strip()]
    denied: set[str] = set()
    for sentence in reversed(read[-SENTENCES:]):
        if len(sentence) > LONGEST or sentence.endswith(("?", "？")):
            return None
        if _ONE_OF_BOTH.search(sentence) or DENIED.search(sentence):
            return None
        sides = _sides(sentence, letters)
        denied |= sides.denied
        chosen = sides.chosen - denied
        settled = chosen and chosen in (
            sides.together,
            chosen & (sides.affirmed | (sides.options if denied else set())),
        )
        if settled and (len(chosen) == 1 or chosen == sides.together):
            return Weighed("".join(sorted(chosen)), sentence) if chosen <= set(letters) else None
        if chosen or sides.open:
            return None
    return None


class _Sides(NamedTuple):
    """Letters that a sentence names without denying them (`chosen`); those of them that it affirms, that stand where an
    option does, or that it calls right together; those that it leaves open; and those that it denies."""

    chosen: set[str]
    affirmed: set[str]
    options: set[str]
    together: set[str]
    open: set[str]
    denied: set[str]


def _sides(sentence: str, letters: str) -> _Sides:
    sides = _Sides(set(), set(), set(), set(), set(), set())
    found = [
        match
        for match in _MENTION.of(letters).finditer(sentence)
        if match[0] != "A" or not _ARTICLE.match(sentence, match.end())
    ]
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found[1:]), len(sentence)]
    for match, end, start in zip(found, ends, starts, strict=False):
        before, after = sentence[end : match.start()], sentence[match.end() : start]
        named = set(re.findall("[A-Z]", match[0]))
        of_next = start < len(sentence) and _OF_THE_NEXT.fullmatch(after)
        begins = _BEGINS.search(before) or _YES_BEFORE.search(before)
        if NO_BEFORE.search(before) or (not of_next and _NO_AFTER.match(after)):
            sides.denied.update(named)
        elif (
            _IF_BEFORE.search(before)
            or supposed(sentence[: match.start()], sentence[match.start() :])
            or (len(named) > 1 and (_OPEN_BEFORE.search(before) or after.startswith("之间")))
        ):
            sides.open.update(named)
        else:
            sides.chosen.update(named)
            sides.affirmed.update(named if _YES_BEFORE.search(before) or (begins and _YES_AFTER.match(after)) else ())
            sides.options.update(named if begins else ())
            sides.together.update(named if len(named) > 1 and begins and _ALL_AFTER.match(after) else ())
    return sides._replace(open=sides.open - sides.chosen)
