"""Multiple choice: which letters a text decides for, be it by letter or by the text of an option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gruppo.data.options import (
    LABELLED,
    LETTERS,
    MARKS,
    TEXT_STYLE,
    bare_words,
    capitals,
    letters_of,
    options_of,
    plain_text,
    unlabelled,
)
from gruppo.rewards.grading.extraction import decisions, last_sentence, own_answer, sentence
from gruppo.rewards.grading.quantities import Quantity, cleaned, quantities, same_quantity, spelled


class Choice(NamedTuple):
    """Letters that a text decides for, in order; more than one where it names several. `undecided`: "A or B"."""

    letters: str
    rule: str
    text: str
    undecided: bool = False


# One letter or several, with brackets: "(B)", "A, C", "A和C", "ABD"; the article "A" of "A train" is none.
_LETTER = r"(?:[(（\[]\s*[A-J]\s*[)）\]]|[A-J][)）\]]?)"


_AND = r"(?:\s*(?:,\s*and\b|,|、|，|&|/|\band\b|和|与|及|以及|\bor\b|或者?)\s*|\s+|)"


_GROUP = rf"(?<![A-Za-z])(?P<group>{_LETTER}(?:{_AND}{_LETTER}){{0,9}})(?:(?<=[)）\]])|(?![A-Za-z'’\d]|-[A-Za-z]))"


_LEAD = r"[\s\"“”'‘’:：]*(?:(?:option|choice|letter|answer|statement|选项|选择|选)s?[\s:：]*)?[\"“'‘]*"


_ARTICLE = re.compile(
    r"\s+(?!because|since|as|is|are|was|which|with|and|or|for|by|due|given|that|but|not|the|would|here|in\b)[a-z]"
)


_FOUND = [
    re.compile(pattern)
    for pattern in (
        rf"(?i:\b(?:answers?|choices?|options?)(?: to [^.\n]{{1,60}}?)?,?\s+"
        rf"(?:is|are|was|would be|should be|must be|has to be)"
        rf"(?: therefore| thus| then| clearly| simply)?[\s:：]*(?:given by |the )?){_LEAD}{_GROUP}",
        rf"(?i:\b(?:answers?|ans\.?|choice|option)\s*[:：=]\s*){_LEAD}{_GROUP}",
        rf"(?i:\b(?:choose|select|pick|chose|selected|picked|go with|going with|matches|corresponds to|match)\s+)"
        rf"(?i:(?:the )?(?:correct |right )?(?:option|choice|answer|letter)s?\s*)?{_LEAD}{_GROUP}",
        rf"(?i:\b(?:is|be|gives|means)\s+(?:the\s+)?(?:correct\s+)?(?:option|choice)\s*[:：]?){_LEAD}{_GROUP}",
        rf"(?:(?i:option|choice|statement)s?\s+)?{_GROUP}\s+(?:is|are|seems|looks|appears|must be)\s+"
        rf"(?:to be\s+)?(?:the\s+|therefore\s+|thus\s+)?(?:only\s+)?"
        rf"(?:(?:correct|right|best|true|answer|solution)\b(?!\s+(?:that|if|when|for|to))|one (?:that works|we want))",
        rf"(?i:\bonly\s+(?:(?:option|choice|answer)\s+)?){_GROUP}\s+(?:works?|fits?|satisf(?:y|ies)|matche?s?|holds?)\b",
        rf"(?i:\b(?:so|thus|hence|therefore)),?\s+(?i:(?:option|choice)\s+)?{_GROUP}(?=\s*(?:[.!\n]|$))",
        rf"(?:答案|正确选项|正确的选项|正确的是|符合题意的是|应选|故选|可选|选择|本题选|因此选|所以选|选)"
        rf"(?:应该|应当|应|就)?(?:选择|选|是|为|：|:)?\s*{_LEAD}{_GROUP}",
        rf"{_GROUP}\s*(?:选项|项)?(?:是正确的|正确|是对的|是正确答案|是答案)(?!的?是)",
    )
]


_ALONE = re.compile(rf"{_LEAD}{_GROUP}(?:(?<=[)）\]])|\s*(?:选项|项)?(?:[.,:：。、!;；]|$))")


def choice_of(text: str, options: Sequence[str], letters: str) -> Choice | None:
    """The last decision of a text for one of `letters` (or several); None where it names none.

    It may be a letter ("the answer is (B)", a box, 故选B, a text or a last line that is a letter), or the words or the
    value of an option in the place of an answer.
    """
    text = own_answer(text).translate(_FULL_WIDTH)
    found = sorted(_named(text, options, letters), key=lambda each: each[0])
    if found:
        return found[-1][1]
    if (judged := _by_verdict(text, letters)) is not None:
        return judged
    listed = _lists(text)
    for rule, part in (
        ("whole text", text),
        ("last line", "" if listed and LABELLED.match(_last_line(text)) else _last_line(text)),
        ("first line", text.strip().split("\n")[0]),
    ):
        if len(part) < _SHORT and not _lists(part) and (alone := _alone(part, rule, letters)) is not None:
            return alone
    last = last_sentence(text)
    return (
        _by_mention(text, letters)
        or _by_value(last, "last sentence", options)
        or _by_value(last.rpartition("=")[2], "last equation", options)
    )


_FULL_WIDTH = {0xFF21 + place: letter for place, letter in enumerate(LETTERS)}


_SHORT = 150  # letters of a text or line that begins with its answer, at the most


def _lists(part: str) -> bool:
    """Whether a text goes through several options: "(A) 4 (B) 5"."""
    return len(set(re.findall(r"(?<![A-Za-z])[(（]?([A-J])[)）.:：](?=\s)", plain_text(part)))) > 1


def _named(text: str, options: Sequence[str], letters: str) -> Iterator[tuple[int, Choice]]:
    for decision in decisions(text):
        part = decision.text if decision.rule in ("boxed", "tags") else sentence(decision.text)
        made = _alone(part, decision.rule, letters, whole=decision.rule in ("boxed", "tags"))
        made = made or _by_value(part, decision.rule, options)
        if made is not None:
            yield decision.start, made
    plain = _plain_in_place(text)
    for pattern in _FOUND:
        for found in pattern.finditer(plain):
            made = _choice(found, "phrase", letters, plain)
            if made is not None and not _denied(plain, found) and not _ASKED.match(plain, found.end()):
                yield found.start("group"), made


def _plain_in_place(text: str) -> str:
    """The text without its marks of style, every letter where it was."""
    blank = lambda found: " " * len(found[0])  # noqa: E731
    return capitals(MARKS.sub(blank, TEXT_STYLE.sub(blank, text)))


_DENIED = re.compile(
    r"(?:\b(?:not|cannot|neither|nor|wrong|incorrect|false|rul(?:e|es|ed|ing) out|eliminat(?:e|es|ed|ing)|"
    r"exclud(?:e|es|ed|ing)|discard|reject)\b|n['’]t\b|不是|不选|不能选|不能是|排除)"
    r"(?:[ \t(\"'“]+(?:be|is|are|was|the|an?|correct|right|option|choice|answer|statement|necessarily)\b)*"
    r"[ \t(（\"'“:]*$",
    re.IGNORECASE,
)


_REFUSED = re.compile(
    r"[)）\]]?\s*(?:选项|项)?\s*(?:(?:is|are|was|would be|must be|seems|looks)?\s*"
    r"(?:(?:definitely|clearly|also|certainly)\s+)?(?:not|wrong|incorrect|false|impossible|out)\b"
    r"|(?:is|are|was|does|do|did|can|could|would|wo|ca)n['’]t\b|(?:does|do|can|could|would)\s*not\b|不|错)"
)


_ASKED = re.compile(r"[^.!?\n]{0,20}[?？]")


def _denied(text: str, found: re.Match[str]) -> bool:
    """Whether the words before or after letters say that they are not the answer: "not (B)", "(B) is wrong"."""
    place = found.start("group")
    return bool(_DENIED.search(text[max(0, place - 60) : place]) or _REFUSED.match(text, found.end("group")))


def _alone(part: str, rule: str, letters: str, whole: bool = False) -> Choice | None:
    """The letters with which a text begins, and nothing else decides: "B", "(B) 42", "B. because …"."""
    plain = plain_text(part).strip(" \n\t\"'“”‘’")
    found = _ALONE.match(plain) if not whole else re.match(rf"{_LEAD}{_GROUP}", plain)
    return _choice(found, rule, letters, plain) if found and not _REFUSED.match(plain, found.end("group")) else None


def _choice(found: re.Match[str], rule: str, letters: str, text: str) -> Choice | None:
    group = found["group"]
    named = "".join(re.findall("[A-J]", group))
    bare = re.fullmatch(r"\s*[AI]\s*", group)
    if bare and (_ARTICLE.match(text, found.end("group")) or re.match(r"\s+[A-Z][a-z]", text[found.end("group") :])):
        return None
    if not named or set(named) - set(letters):
        return None
    return Choice("".join(sorted(set(named))), rule, group.strip(), _open(group))


def _open(group: str) -> bool:
    return len(set(re.findall("[A-J]", group))) > 1 and bool(re.search(r"\bor\b|或", group))


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().split("\n") if line.strip()]
    return lines[-1] if lines else ""


_JUDGED = re.compile(
    r"^[\s*>-]*[(（]?([A-J])[)）.:：][^\n]*?(?<!not )(?<!n't )\b(?:right|correct|true|True|Correct)\b[^\n]*$",
    re.MULTILINE,
)


def _by_verdict(text: str, letters: str) -> Choice | None:
    """The only option that a list of verdicts calls right: "A) 4 is wrong", "B) 5 is right"."""
    if not _lists(text):
        return None
    right = [found[1] for found in _JUDGED.finditer(plain_text(text))]
    return Choice(right[0], "verdicts", text[:200]) if len(right) == 1 and right[0] in letters else None


_BRACKETED = re.compile(r"[(（]\s*(?P<group>[A-J])\s*[)）]")


_CONCLUDED = re.compile(
    r"(?:\b(?:so|thus|hence|therefore|then|is|are|be|guess|say|option|choice|leaves|leaving|with|means|for|to|pick|but|definitely|probably|both|answer)\b"
    r"|^|['’]s\b|[∴→⇒:：,(（-])[\s,:(（\"'“-]*(?:(?:option|choice) )?(?P<group>[B-HJ])(?=\W*$)",
    re.IGNORECASE,
)


def _by_mention(text: str, letters: str) -> Choice | None:
    """The only letter in brackets of the last sentence, or with which it concludes: "so it must be (B)", "I say B"."""
    last = plain_text(last_sentence(text))
    if text.rstrip(" *_$").endswith(("?", "？")):
        return None
    found = list(_BRACKETED.finditer(last)) or list(_CONCLUDED.finditer(last))
    named = [each["group"] for each in found if not _denied(last, each)]
    if len(set(named)) != 1 or named[0] not in letters:
        return None
    return Choice(named[0], "mention", last.strip()[:200])


def _by_value(part: str, rule: str, options: Sequence[str]) -> Choice | None:
    """The one option whose words or number a text gives; an option that is in another one is not taken for it."""
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


def _has(said: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", said) is not None


def _same_number(part: str, option: str) -> bool:
    """Whether text and option are each one number, with a unit at most, and the same one."""
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
    """Whether text and option are the same formula, where the option is one that numbers and words do not settle."""
    from gruppo.rewards.grading.formulas import same_formula

    if len(part) > 200 or not re.search(r"\\[a-zA-Z]|[=^√π]", option) or not re.search(r"[\d\\]", part):
        return False
    try:
        return same_formula(part, unlabelled(option))
    except TimeoutError:
        return False


def grade_choice(text: str, answer: object, columns: Mapping[str, Any]) -> bool:
    """Whether a text decides for the letters of the reference, all of them and no others."""
    options = options_of(columns)
    wanted = letters_of(answer, options)
    letters = LETTERS[: max(len(options) or 5, LETTERS.index(wanted[-1]) + 1)]
    made = choice_of(text, options, letters)
    return made is not None and not made.undecided and made.letters == wanted
