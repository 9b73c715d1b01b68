"""The formula that a sentence or a line states as its answer."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from gruppo.rewards.grading.extraction import Decision
from gruppo.rewards.grading.latex import Formula, formulas

_REASON = re.compile(r",? (?:because|since|as|which|where|for all|when|so|by|after|for every)\b|[.!?](?=\s|$)|[。！？]")
_SPACE = r"(?:\s|~|\\(?:q?quad|[,;:! ]|(?:text|mathrm|mbox)\s*+\{[\s~]*+\})|\\\\)*+"
BETWEEN = re.compile(
    rf"{_SPACE}(?P<mark>,?\s*+(?:and|or)\b|,|;|；|，|和|或|\\(?:text|mathrm|mbox)\s*+\{{[\s~]*+,?\s*+(?:and|or)[\s~]*+\}})?{_SPACE}"
)


_ITEM = re.compile(r"(?<![A-Za-z0-9'′)\]}])[（(]\s*\d\s*[)）]\s*(?=\$|\\\()")  # "(1) $5$; (2) $10$", not "$f(1)$"


# The verb after which a sentence gives its value: "the largest n is 34".
_COPULA = re.compile(
    r"(?<=[\s$)])(?:(?:must|should|has to|have to|will|would|can only) (?=be |equal ))?+"
    r"(?:is|are|was|were|be|equals?|becomes|gives|has|have)"
    r"(?: (?:equal to|exactly|just|only|therefore|thus|then))*+"
    r"(?=[\s:])\s*+:?\s*+"
)
# The words before a number that only names what was given ("of the 20 points"), and what follows an answer.
GIVEN = re.compile(r"\b(?:the|these|those|all|both|his|her|their|its|our|my|your)(?: other)?\s+\$?$", re.IGNORECASE)
_WITHIN = re.compile(
    r"\s(?:of|for|in|from|on|to|by|with|among|at|between) (?:the|these|those|all|each|every|his|her|their|its|our)\b"
)
_NUMBER = re.compile(r"(?<![\w.,/])[-+−–]?(?:\d++(?:[.,/]\d++)*+)")
# What makes the number behind it another: signs of a formula ("√3", "n^2", "x ≥ 3", "x − 3") and "not".
_PART = re.compile(r"(?:\bnot|[+*/^√±<>≤≥≠×·]|(?<![A-Za-z])[A-Za-z]\s?[-−–])\s?$")
# The beginning of a formula without dollar signs: a sign, a digit, a bracket, a variable before an operator, a name.
_BEGINS = re.compile(
    r"[-+−–±√∞π|\d(\[{]|\\(?!end\b)|[<>≤≥≈=]\s?[-+−–±\d√π]|[A-Za-zα-ω](?:\s?[-+−*/^=<>≤≥≠≈∈²³·×_]|['′]?\()"
    r"|[A-Za-z]{2}\s?[+*/^²³]|(?:sqrt|ln|log|exp|arc(?:sin|cos|tan)|sin|cos|tan|pi)(?![A-Za-z])"
)
# The word before a conclusion: "The angle is $60^\circ$, so $\cos 60^\circ = \frac12$".
SO = re.compile(
    r"\b(?:(?:so|thus|therefore|hence)\b(?! (?:far|on|that|many|much)\b)|which (?:implies|gives|yields)\b)[,:\s]*+"
    r"|(?:所以|因此)[，,:：\s]*+",
    re.IGNORECASE,
)
_END = re.compile(r"[.!?](?=\s|$)|[。！？]")
_RELATION = re.compile(r"[=<>≤≥≈]|\\(?:leq?|geq?|lt|gt|approx|equiv|in)(?![A-Za-z])")
_OR = re.compile(r",?\s++or\b")
# A value that is no name: words, a number.
_IS_VALUE = re.compile(
    r"(?:\$|\\[(\[]|\s)*+(?:\\(?:text|mathrm|mbox)\s*+\{[^{}]*+\}|[-+]?\d[\d.,]*+)(?:\$|\\[)\]]|\s)*+"
)
# The result of an equation in words: "he has 80/8 = 10 packs"; not that of an unknown ("5x = 10").
_EQUALS = re.compile(r"(?<=[\w)!%])\s*+(?:=|≈)\s*+(?=[-+$]?[\d\\])")
_UNKNOWN = re.compile(r"(?:\d\s?\*?\s?|[-+*/^]\s?)[a-z](?![a-z])|(?<![a-zA-Z])[a-z]\s?[-+*/^]")
_ABOUT_IT = re.compile(r"\s+(?:is|are|was) (?:the|a|an|our|my|your)\b")


def said_formula(decision: Decision) -> str:
    """The formula that a decision's text states: the one with which it begins, unless its value follows ("$x$ is 5");
    else the one after its last verb or equals sign, or the only number that is not given ("17 of the 20 points").

    What follows the last "so" counts, unless the text begins with a value. Words are cut at a reason ("because …").
    """
    whole = _ITEM.sub("", decision.text.strip().lstrip(":：* `"))
    text = _concluded(whole)
    is_whole, found = text == whole, formulas(text)
    if found and found[0].start == 0 and (is_whole or _OR.match(text, found[0].end)):
        verb = _COPULA.match(text, found[0].end + 1)
        if verb and _IS_VALUE.fullmatch(found[0].text) and not text.startswith(("$", "\\"), verb.end()):
            verb = None  # "$12$ is 3 more than $9$"
        return (_value(text[verb.end() :]) if verb else "") or _connected(text, found)
    text = re.sub(r"(?<=\d)\.(?=\s*$|\s+[A-Z])", " . ", text)
    found = formulas(text)
    if is_whole and _BEGINS.match(text):
        return _ABOUT_IT.split(_REASON.split(text, maxsplit=1)[0], maxsplit=1)[0].strip(" *")
    equals = [one for one in _EQUALS.finditer(text) if not _UNKNOWN.search(text, max(0, one.start() - 40), one.start())]
    verbs = sorted(_outside([*_COPULA.finditer(text), *equals], found), key=lambda verb: verb.end())
    for verb in reversed(verbs):
        if value := _value(text[verb.end() :]):
            return value
    if found:
        return _new(text, found)[-1].text
    numbers = _new(text, [Formula(one.start(), one.end(), one[0]) for one in _NUMBER.finditer(text)])
    only = numbers[0].start if len(numbers) == 1 else 0
    return _until_reason(text if _PART.search(text, max(0, only - 4), only) else text[only:])


def _concluded(text: str) -> str:
    """A text from its last "so" on, if it begins with no value and if a formula or a number follows.

    After an equation with which it begins, only the first sentence counts.
    """
    found = formulas(text)
    begins = bool(found) and found[0].start == 0
    if (begins and not _RELATION.search(found[0].text)) or (not begins and _BEGINS.match(text)):
        return text
    end = _END.search(text, found[0].end) if begins else None
    for so in reversed(_outside(SO.finditer(text, 0, end.start() if end else len(text)), found)):
        if formulas(text[so.end() :]) or _NUMBER.search(text, so.end()):
            return text[so.end() :]
    return text


def _outside(matches: Iterable[re.Match[str]], found: Sequence[Formula]) -> list[re.Match[str]]:
    """The matches that begin in no formula."""
    starts = [one.start for one in found]
    places = [(one, bisect_right(starts, one.start()) - 1) for one in matches]
    return [one for one, place in places if place < 0 or one.start() >= found[place].end]


def _new(text: str, found: Sequence[Formula]) -> Sequence[Formula]:
    """The formulas that are not given, or all if there are only given ones."""
    return [one for one in found if not GIVEN.search(text, max(0, one.start - 20), one.start)] or found


def _value(text: str) -> str:
    """The formula or number with which a text begins; "" if it begins with words."""
    if text.startswith(("$", "\\(", "\\[")) and (inner := formulas(text)) and inner[0].start == 0:
        return _connected(text, inner)
    return _until_reason(text) if re.match(r"[-+−–±]?\s?[\d.√∞π]|\\(?!text)", text) else ""


def _until_reason(text: str) -> str:
    text = _REASON.split(text, maxsplit=1)[0]
    return (_WITHIN.split(text, maxsplit=1)[0] if _NUMBER.match(text) else text).strip(" *")


def _connected(text: str, found: Sequence[Formula]) -> str:
    """The first formula of a text, and those that "and", "or" or a comma connects to it, with a percent sign."""
    parts, end = [found[0].text], found[0].end
    for after in found[1:]:
        between = BETWEEN.fullmatch(text, end, after.start)
        if not between or not between["mark"]:
            break
        parts.append(("; " if between["mark"] in (";", "；") else ", ") + after.text)
        end = after.end
    percent = re.match(r"\s*+(?:\\?%|percent)", text[end : end + 20])
    return "".join(parts) + ("\\%" if percent else "")
