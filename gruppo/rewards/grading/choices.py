"""Multiple choice: the letters that a text chooses, by letter or by the text of an option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from gruppo.data.options import (
    LABELLED,
    LETTERS,
    MARKS,
    TEXT_STYLE,
    Lettered,
    asked,
    bare_words,
    capitals,
    plain_text,
    unlabelled,
)
from gruppo.rewards.grading import languages
from gruppo.rewards.grading.extraction import decisions, last_sentence, own_answer, sentence
from gruppo.rewards.grading.quantities import Quantity, cleaned, quantities, same_quantity, spelled
from gruppo.rewards.grading.weighing import CALLED_WRONG, NO_BEFORE, OTHERS, supposed, weighed


class Choice(NamedTuple):
    """Letters that a text chooses, sorted; several if it names several.

    `rule`: how they were found; `text`: the passage; `undecided`: whether the text leaves the choice open ("A or B").
    """

    letters: str
    rule: str
    text: str
    undecided: bool = False


_OR = rf"(?:\bor\b|或者?|{languages.OR})"


_AND = rf"(?:[\s…]*+(?:,\s*+and\b|,|、|，|&|/|\band\b|和|与|及|以及|{languages.AND}|{_OR})\s*+|\s++|)"


# One or several letters, with or without brackets: "(B)", "A, C", "A和C", "ABD", "(AD)"; not the article in "A train",
# nor the pair in "(A, B) = (1, 2)".
_LETTER = (
    rf"(?:[(（\[]\s*+[A-J](?:\s*+[)）\]]|(?:{_AND}[A-J]){{1,9}}\s*+[)）\]](?!\s*+=))"
    r"|[A-J][)）\]]?)"
)


_GROUP = rf"(?<![A-Za-z])(?P<group>{_LETTER}(?:{_AND}{_LETTER}){{0,9}})(?:(?<=[)）\]])|(?![A-Za-z'’\d]|-[A-Za-z]))"


_LEAD = r"[\s\"“”'‘’:：]*+(?:(?:option|choice|letter|answer|statement|选项|选择|选)s?[\s:：]*+)?[\"“'‘]*+"


_ARTICLE = re.compile(
    r"\s++(?!because|since|as|is|are|was|which|with|and|or|for|by|due|given|that|but|not|the|would|here|in\b)[a-z]"
    r"|\s++[A-Z][a-z]"
)


_PHRASES = [
    Lettered(pattern)
    for pattern in (
        rf"(?i:\b(?:answers?|choices?|options?)(?: to [^.\n]{{1,60}}?)?,?\s++"
        rf"(?:is|are|was|would be|should be|must be|has to be)"
        rf"(?: therefore| thus| then| clearly| simply)?[\s:：]*+(?:given by |the )?){_LEAD}{_GROUP}",
        rf"(?i:\b(?:answers?|ans\.?|choice|option)\s*+[:：=]\s*+){_LEAD}{_GROUP}",
        rf"(?i:\b(?:choose|select|pick|chose|selected|picked|go with|going with|matches|corresponds to|match)\s++)"
        rf"(?i:(?:the )?(?:correct |right )?(?:option|choice|answer|letter)s?\s*+)?{_LEAD}{_GROUP}",
        rf"(?i:\b(?:is|be|gives|means)\s++(?:the\s++)?(?:correct\s++)?(?:option|choice)\s*+[:：]?){_LEAD}{_GROUP}",
        rf"(?:(?i:option|choice|statement)s?\s++)?{_GROUP}\s++(?:is|are|seems|looks|appears|must be)\s++"
        rf"(?:to be\s++)?(?:the\s++|therefore\s++|thus\s++)?(?:only\s++)?"
        rf"(?:(?:correct|right|best|true|answer|solution)\b(?!\s++(?:that|if|when|for|to))|one (?:that works|we want))",
        rf"(?i:\bonly\s++(?:(?:option|choice|answer)\s++)?){_GROUP}\s++(?:works?|fits?|satisf(?:y|ies)|matche?s?|holds?)\b",
        rf"(?i:\b(?:so|thus|hence|therefore)),?\s++(?i:(?:option|choice)\s++)?{_GROUP}"
        rf"(?:\s++(?:holds?|works?|fits?|applies|follows))?(?=[^\S\n]*+(?:[.!\n]|$))",
        rf"(?i:\b(?:it|this|that) (?:has to|must|can only) be\s++){_LEAD}{_GROUP}"
        rf"(?=\s*+(?:[.,;:!]|$)|\s++(?:because|since|as|for|given)\b)",
        rf"(?i:\b(?:supports?|points? to|favou?rs?|indicates?)\s++){_LEAD}{_GROUP}(?=\s*+(?:[.,;:!]|$))",
        rf"(?:答案|正确选项|正确的选项|正确的是|符合题意的是|应选|故选|可选|选择|本题选|因此选|所以选|选)"
        rf"(?:应该|应当|应|就)?(?:选择|选|是|为|：|:)?\s*+{_LEAD}{_GROUP}",
        rf"{_GROUP}\s*+(?:选项|项)?(?:是正确的|正确|是对的|是正确答案|是答案)(?!的?是)",
    )
]


class _Foreign(NamedTuple):
    phrase: Lettered
    denials: re.Pattern[str]
    doubts: re.Pattern[str]


def _foreign(language: languages.Language) -> list[_Foreign]:
    """The phrases of a language as patterns."""
    denials, doubts = re.compile(language.denials, re.IGNORECASE), re.compile(language.doubts, re.IGNORECASE)
    letters = rf"{_LETTER}(?:{_AND}{_LETTER}){{0,9}}"
    found = []
    for phrase in language.phrases:
        named = re.sub("(?<!^)(?:OTHER|IT)", lambda name: languages.OPTION + name[0], phrase)
        spaced = named.replace(" ?", r"\s*+").replace(" ", r"\s++").replace("$", r"(?=[^\S\n]*+(?:[.!\n]|$))")
        pattern = spaced.replace("OTHER", f"(?-i:{letters})").replace("IT", rf"[\"“„«‘「]{{0,2}}(?-i:{_GROUP})")
        found.append(_Foreign(Lettered(f"(?i:{pattern})"), denials, doubts))
    return found


@cache
def foreign_phrases() -> Sequence[_Foreign]:
    """The phrases of all languages but English and Chinese."""
    return [phrase for language in languages.LANGUAGES.values() for phrase in _foreign(language)]


_ALONE = Lettered(rf"{_LEAD}{_GROUP}(?:(?<=[)）\]])|\s*+(?:选项|项)?(?:[.,:：。!;；…]|、(?!\s*+[A-J])|$))")


_ONLY = Lettered(rf"(?i:(?:option|choice|answer|letter)s?)\s++{_GROUP}[\s.。!]*+$")


_FIRST = Lettered(rf"{_LEAD}{_GROUP}")


def choice_of(text: str, options: Sequence[str], letters: str) -> Choice | None:
    """The last choice of a text among `letters`, one or several; None if it chooses none.

    A choice is a letter ("the answer is (B)", a box, 故选B, a text or a last line that is a letter), or the words or
    the value of an option where an answer is expected.
    """
    full = own_answer(text).translate(_FULL_WIDTH)
    text = _without_own_texts(full, tuple(options), letters)
    found = sorted(_named(text, options, letters), key=lambda item: item[0])
    if found:
        return found[-1][1]
    if (correct := _by_verdict(text, letters)) is not None:
        return correct
    listed = _lists(text, letters)
    for rule, part in (
        ("whole text", text),
        ("last line", "" if listed and LABELLED.of(letters).match(_last_line(text)) else _last_line(text)),
        ("first line", text.strip().split("\n")[0]),
    ):
        if len(part) < _SHORT and not _lists(part, letters) and (alone := _alone(part, rule, letters)) is not None:
            return alone
    if (settled := weighed(text, letters)) is not None:
        return Choice(settled.letters, "weighed", settled.text)
    last = last_sentence(text)
    if last.strip(" *_$") == _LEFT_OUT:  # of "So it's C. A bird"
        last = last_sentence(full)
    if (mentioned := _by_mention(text, letters)) is not None:
        return mentioned
    before, would, after = last.partition("would")
    if supposed(before + would, after):
        return None
    return _by_value(last, "last sentence", options) or _by_value(last.rpartition("=")[2], "last equation", options)


_LEFT_OUT = "…"  # stands for the text of an option after its letter


def _without_own_texts(text: str, options: tuple[str, ...], letters: str) -> str:
    """A text whose options are their letters: "(C) A bird" becomes "(C) …" if that is the text of option C.

    So letters, full stops and denials in the text of an option are not read as those of the text. Braces stay.
    """
    pattern = _own_texts(options, letters)
    parts, end = [], 0
    for found in pattern.finditer(_plain_in_place(text, letters)) if pattern else ():
        start = found.start(found.lastgroup or 0)
        parts += [text[end:start], _NOT_BRACES.sub(_LEFT_OUT, text[start : found.end()])]
        end = found.end()
    return "".join([*parts, text[end:]])


_NOT_BRACES = re.compile("[^{}]+")


@lru_cache(maxsize=256)
def _own_texts(options: tuple[str, ...], letters: str) -> re.Pattern[str] | None:
    """Letters followed by the text of their option, which is the group of the letter; None without options.

    Only a bracket, a full stop or a colon separates a letter from a text of letters ("D) A and B") or of one word.
    """
    found = []
    for letter, option in zip(letters, options, strict=False):
        words = _plain_in_place(option, letters).strip(" .。,;:，；").split()
        if words:
            short = len(words) == 1 or _LETTERS_ONLY.of(letters).fullmatch(" ".join(words))
            said = r"\s++".join(map(re.escape, words))
            found.append(rf"{letter}{_MARK if short else _MARK_OR_SPACE}(?P<{letter}>(?i:{said}))")
    return re.compile(rf"(?<![A-Za-z])(?:{'|'.join(found)}){_TEXT_ENDS}") if found else None


_MARK = r"\s*+[)）\].:：、]\s*+"


_MARK_OR_SPACE = rf"(?:{_MARK}|\s*+[,，–—-]\s++|\s++)"


_TEXT_ENDS = (
    r"(?=[^\S\n]*+(?:[.,;:!?。，；：！？)）\]}\"”’\n]|$)"
    r"|\s++(?:because|since|as|for|is|are|was|were|does|do|can|could|would|and|or|but|not)\b)"
)


_LETTERS_ONLY = Lettered(rf"{_LETTER}(?:{_AND}{_LETTER})*+")


_FULL_WIDTH = {0xFF21 + place: letter for place, letter in enumerate(LETTERS)}


_SHORT = 150  # maximum characters of a text or line that begins with its answer


_LABEL = Lettered(r"(?<![A-Za-z])[(（]?([A-J])[)）.:：](?=\s)")


def _lists(part: str, letters: str) -> bool:
    """Whether a text lists several options: "(A) 4 (B) 5"."""
    return len(set(_LABEL.of(letters).findall(plain_text(part, letters)))) > 1


def _named(text: str, options: Sequence[str], letters: str) -> Iterator[tuple[int, Choice]]:
    for decision in reversed(decisions(text)):
        part = decision.text if decision.rule in ("boxed", "tags") else sentence(decision.text)
        if supposed(_before(text, decision.start), part):
            continue
        chosen = _alone(part, decision.rule, letters, whole=decision.rule in ("boxed", "tags"))
        chosen = chosen or _by_value(part, decision.rule, options)
        if chosen is not None:
            yield decision.start, chosen
            break
    plain = _plain_in_place(text, letters)
    for pattern in _PHRASES:
        for found in pattern.of(letters).finditer(plain):
            chosen = _choice(found, "phrase", letters, plain)
            if (
                chosen is not None
                and not _denied(plain, found)
                and not _ASKED.match(plain, found.end())
                and not _supposed(plain, found)
            ):
                yield found.start("group"), chosen
    for foreign in foreign_phrases():
        for found in foreign.phrase.of(letters).finditer(plain):
            chosen = _choice(found, "phrase", letters, plain)
            if chosen is not None and not _left_open(plain, found, foreign):
                yield found.start("group"), chosen


def _left_open(text: str, found: re.Match[str], foreign: _Foreign) -> bool:
    """Whether the words around a phrase of another language deny it, ask for it, or make it depend on something."""
    before, after = _before(text, found.start()), _after(text, found.end())
    return bool(
        foreign.doubts.search(_SENTENCE.split(before)[-1] + after)
        or foreign.denials.search(_CLAUSE.split(before)[-1])
        or foreign.denials.search(after)
        or _ASKED.match(text, found.end())
        or _RETRACTED.match(text, found.end())
    )


_RETRACTED = re.compile(rf"\s*+[.,;–—-]\s*+(?i:{languages.NO})\s*+,")


_SENTENCE = re.compile(r"[.!?\n。！？।؟]")


_CLAUSE = re.compile(r"[.!?\n。！？।؟,;，、；،؛—–]")


def _before(text: str, place: int) -> str:
    return text[max(0, place - _SHORT) : place]


def _after(text: str, place: int) -> str:
    """The rest of the clause after `place`."""
    return _CLAUSE.split(text[place : place + _SHORT], maxsplit=1)[0]


def _plain_in_place(text: str, letters: str) -> str:
    """The text with style marks blanked out; every letter keeps its position."""
    blank = lambda found: " " * len(found[0])  # noqa: E731
    return capitals(MARKS.sub(blank, TEXT_STYLE.sub(blank, text)), letters)


_DENIED = re.compile(
    r"(?:\b(?:not|cannot|neither|nor|wrong|incorrect|false|rul(?:e|es|ed|ing) out|eliminat(?:e|es|ed|ing)|"
    r"exclud(?:e|es|ed|ing)|discard|reject|"
    r"doubt(?: (?:that )?it(?:['’]s| is))?|(?:everything|anything|all|any) (?:but|except))\b|"
    r"n['’]t\b|不是|不选|不能选|不能是|排除)"
    r"(?:[ \t(\"'“]+(?:be|is|are|was|the|an?|correct|right|option|choice|answer|statement|necessarily)\b)*"
    r"[ \t(（\"'“:]*$",
    re.IGNORECASE,
)


# Before words that choose: "I'd never (choose D)", "most students (pick D)", "if (the answer is D)".
_NOT_CHOSEN = re.compile(
    r"(?:\b(?:not|never|hardly|cannot|fail(?:s|ed)? to|"
    rf"{OTHERS}|(?:if|whether|suppos(?:e|ing)|assum(?:e|ing)|unless)(?: (?:that|the|my|our|this|correct|right))*)"
    r"|n['’]t)(?: (?:go|choose|pick|select|say|answer))?"
    r"(?: (?:ever|really|simply|just|actually|be|have to|want to|going to|to))*\s*$",
    re.IGNORECASE,
)


_REFUSED = re.compile(
    r"[)）\]]?(?:[.:：]\s*+…)?[\s…]*+(?:选项|项)?\s*+(?:(?:(?:is|are|was|would be|must be|seems|looks)\b\s*+)?"
    r"(?:(?:definitely|clearly|also|certainly)\s++)?(?:not|wrong|incorrect|false|impossible|out)\b"
    rf"|(?:is|are|was|seems?|looks?)\s++{CALLED_WRONG}\b"
    r"|(?:is|are|was|does|do|did|can|could|would|wo|ca)n['’]t\b|(?:does|do|can|could|would)\s*not\b|不|错)"
)


_ASKED = re.compile(r"[^.!?\n]{0,20}[?？]")


def _denied(text: str, found: re.Match[str]) -> bool:
    """Whether the words before or after the letters deny that they are the answer: "not (B)", "(B) is wrong"."""
    start, end = found.span("group")
    return bool(
        _DENIED.search(text[max(0, start - 60) : start])
        or _NOT_CHOSEN.search(text[max(0, found.start() - 60) : found.start()])
        or _REFUSED.match(text, end)
        or languages.DENIED.search(_CLAUSE.split(text[max(0, start - 30) : start])[-1])
        or languages.DENIED.search(_CLAUSE.split(text[end : end + 30], maxsplit=1)[0])
    )


def _supposed(text: str, found: re.Match[str]) -> bool:
    start = found.start("group")
    return supposed(_before(text, start), text[start : start + _SHORT])


def _alone(part: str, rule: str, letters: str, whole: bool = False) -> Choice | None:
    """The letters with which a text begins, if they stand alone: "B", "(B) 42", "B. because …"."""
    plain = plain_text(part, letters).strip(" \n\t\"'“”‘’")
    found = (_FIRST if whole else _ALONE).of(letters).match(plain) or _ONLY.of(letters).match(plain)
    return _choice(found, rule, letters, plain) if found and not _denied(plain, found) else None


_CAPITAL = re.compile("[A-Z]")


def _choice(found: re.Match[str], rule: str, letters: str, text: str) -> Choice | None:
    group = found["group"]
    named = "".join(_CAPITAL.findall(group))
    if group.strip() in ("A", "I") and _ARTICLE.match(text, found.end("group")):
        return None
    if not named or set(named) - set(letters):
        return None
    undecided = _open(group) or bool(_OR_ELSE.of(letters).match(text, found.end("group")))
    return Choice("".join(sorted(set(named))), rule, group.strip(), undecided)


_OR_ELSE = Lettered(rf"[\s…]*+,?\s*+{_OR}\s*+(?:\w{{1,20}}\s++){{0,2}}{_LETTER}(?![A-Za-z'’])")


def _open(group: str) -> bool:
    return len(set(_CAPITAL.findall(group))) > 1 and bool(re.search(_OR, group))


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().split("\n") if line.strip()]
    return lines[-1] if lines else ""


_CALLED_CORRECT = Lettered(
    r"^(?:[^\S\n]|[*>-])*+[(（]?([A-J])[)）.:：]"
    r"[^\n]*?(?<!not )(?<!n't )\b(?:right|correct|true|True|Correct)\b[^\n]*$",
    re.MULTILINE,
)


def _by_verdict(text: str, letters: str) -> Choice | None:
    """The option that a list of verdicts calls correct, if there is only one: "A) 4 is wrong", "B) 5 is right"."""
    if not _lists(text, letters):
        return None
    correct = [found[1] for found in _CALLED_CORRECT.of(letters).finditer(plain_text(text, letters))]
    return Choice(correct[0], "verdicts", text[:200]) if len(correct) == 1 and correct[0] in letters else None


_POINTED = Lettered(r"(?:[=-]>|[∴→⇒])\s*+(?:(?:option|choice) )?(?P<group>[A-J])(?=\W*+$)")


_BRACKETED = Lettered(r"[(（]\s*+(?P<group>[A-J])\s*+[)）]")


_CONCLUDED = Lettered(
    r"(?:\b(?:so|thus|hence|therefore|then|is|are|be|guess|say|option|choice|leaves|leaving|with|means|for|to|pick|but|definitely|probably|both|answer)\b"
    r"|^|['’]s\b|[∴→⇒:：,(（-])[\s,:(（\"'“-]{0,20}+(?:(?:option|choice) )?(?P<group>(?![AI])[A-J])(?=\W*$)",
    re.IGNORECASE,
)


def _by_mention(text: str, letters: str) -> Choice | None:
    """The only letter in brackets, or at the end, of the last sentence: "so it must be (B)", "I say B"."""
    last = plain_text(last_sentence(text), letters)
    if text.rstrip(" *_$").endswith(("?", "？")):
        return None
    patterns = (pattern.of(letters) for pattern in (_BRACKETED, _POINTED, _CONCLUDED))
    found = next((matches for pattern in patterns if (matches := list(pattern.finditer(last)))), [])
    named = [match["group"] for match in found if not _denied(last, match) and not _supposed(last, match)]
    if len(set(named)) != 1 or named[0] not in letters:
        return None
    return Choice(named[0], "mention", last.strip()[:200])


def _by_value(part: str, rule: str, options: Sequence[str]) -> Choice | None:
    """The one option that a text states in words or as a number; of options that contain each other, the longest."""
    said = bare_words(part)
    same = [place for place, option in enumerate(options) if said and said == bare_words(option)]
    if not same and len(said) < 400:
        same = [place for place, option in enumerate(options) if _same_number(part, option)]
    if not same and rule in ("boxed", "tags", "answer is"):
        same = [place for place, option in enumerate(options) if _same_formula(part, option)]
    if not same:
        within = [
            place
            for place, option in enumerate(options)
            if len(bare_words(option)) > 3 and _has(said, bare_words(option))
        ]
        longest = max((len(bare_words(options[place])) for place in within), default=0)
        same = [place for place in within if len(bare_words(options[place])) == longest]
        if any(bare_words(options[place]) not in bare_words(options[same[0]]) for place in within):
            return None
    return Choice(LETTERS[same[0]], rule, part.strip()[:200]) if len(same) == 1 else None


# "I do not think it is", "it is not the case that it is"; after other words before "is", a "not" describes something:
# "the city that is not in France is".
_NOT_THOUGHT = re.compile(
    r"(?:\b(?:not|never|hardly|cannot)|n['’]t)(?: \w+)? (?:think|believe|say|mean|agree|claim|the case|true that)\b"
    r"[^,;:]{0,30}$"
    r"|\bdoubt[^,;:]{0,30}$"
)
_COPULA = re.compile(r"\b(?:is|are|was|were)\b")


def _has(said: str, words: str) -> bool:
    """Whether a text has these words at a place that does not deny them: "Berlin, not Paris" has Berlin."""
    places = re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", said)
    return any(
        not _REFUSED.match(said, place.end()) and not _denies(said[max(0, place.start() - 60) : place.start()])
        for place in places
    )


def _denies(before: str) -> bool:
    return bool(
        NO_BEFORE.search(_COPULA.split(before)[-1])
        or _NOT_THOUGHT.search(before)
        or languages.DENIED.search(_CLAUSE.split(before[-30:])[-1])
    )


def _same_number(part: str, option: str) -> bool:
    """Whether text and option are the same single number, with or without a unit."""
    first, second = _numbers(part), _numbers(unlabelled(option))
    if len(first) != 1 or len(second) != 1 or re.search(r"\\sqrt|\\pi|π|√|\^", part + option):
        return False
    rest = re.sub(r"[\d.,/%\s$\\{}()*+-]+|\\?[dt]?frac", " ", cleaned(unlabelled(option))).strip()
    return len(rest) < 25 and same_quantity(first[0], second[0])


def _numbers(text: str) -> list[Quantity]:
    clean = cleaned(text)
    word = None if any(letter.isdigit() for letter in clean) else spelled(clean.strip(), last=False)
    return [word] if word else quantities(clean)


def _same_formula(part: str, option: str) -> bool:
    """Whether text and option are the same formula; only for options that words and numbers cannot decide."""
    from gruppo.rewards.grading.formulas import same_formula

    if len(part) > 200 or not re.search(r"\\[a-zA-Z]|[=^√π]", option) or not re.search(r"[\d\\]", part):
        return False
    return same_formula(part, unlabelled(option))


def grade_choice(text: str, answer: object, columns: Mapping[str, Any]) -> bool:
    """Whether a text chooses exactly the letters of the reference.

    Raises UsageError if `answer` is not a letter, an index or the text of an option.
    """
    options, letters, wanted = asked({**columns, "answer": answer})
    chosen = choice_of(text, options, letters)
    return chosen is not None and not chosen.undecided and chosen.letters == wanted
