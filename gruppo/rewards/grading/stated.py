"""The formula that a sentence or a line states as its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gruppo.rewards.grading.extraction import Decision
from gruppo.rewards.grading.latex import Formula, formulas

_REASON = re.compile(r",? (?:because|since|as|which|where|for all|when|so|by|after|for every)\b|[.!?](?=\s|$)|[。！？]")
_SPACE = r"(?:\s|~|\\(?:q?quad|[,;:! ]|(?:text|mathrm|mbox)\s*+\{[\s~]*+\})|\\\\)*+"
BETWEEN = re.compile(
    rf"{_SPACE}(?P<mark>,?\s*+(?:and|or)\b|,|;|；|，|和|或|\\(?:text|mathrm|mbox)\s*+\{{[\s~]*+,?\s*+(?:and|or)[\s~]*+\}})?{_SPACE}"
)


_ITEM = re.compile(r"[（(]\s*\d\s*[)）]\s*(?=\$|\\\()")  # "(1) $5$; (2) $10$"


# The verb after which a sentence gives its value: "the largest n is 34".
_COPULA = re.compile(
    r"(?<=[\s$)])(?:is|are|was|were|be|equals?|becomes|gives|has|have)"
    r"(?: (?:equal to|exactly|just|only|therefore|thus|then))*+"
    r"(?=[\s:])\s*+:?\s*+"
)
_ABOUT_IT = re.compile(r"\s+(?:is|are|was) (?:the|a|an|our|my|your)\b")


def said_formula(decision: Decision) -> str:
    """The formula that a decision's text states: the one with which it begins, else the one after its last verb.

    Words are cut at a reason ("because …").
    """
    text = _ITEM.sub("", decision.text.strip().lstrip(":：* "))
    found = formulas(text)
    if found and found[0].start == 0:
        return _connected(text, found)
    text = re.sub(r"(?<=\d)\.(?=\s*$|\s+[A-Z])", " . ", text)
    found = formulas(text)
    if re.match(r"[-+\d\\(\[{]", text):
        return _ABOUT_IT.split(_REASON.split(text, maxsplit=1)[0], maxsplit=1)[0].strip(" *")
    verbs = [verb for verb in _COPULA.finditer(text) if not any(one.start < verb.start() < one.end for one in found)]
    for verb in reversed(verbs):
        after = text[verb.end() :]
        if after.startswith(("$", "\\(", "\\[")) and (inner := formulas(after)) and inner[0].start == 0:
            return _connected(after, inner)
        if re.match(r"[-+]?[\d.√∞π]|\\(?!text)", after):
            return _REASON.split(after, maxsplit=1)[0].strip(" *")
    return found[-1].text if found else _REASON.split(text, maxsplit=1)[0].strip(" *")


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
