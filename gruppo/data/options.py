"""Options of multiple-choice questions, and the letters of their reference answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from gruppo.data.references import answer_text
from gruppo.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


USUAL = 10  # with at most this many options, only letters up to J name one


TEXT_STYLE = re.compile(
    r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|mbox|boldsymbol|bf|rm|operatorname)\b\s*+|\\[()\[\]!,; ]"
    r"|</?(?:b|strong|i|em|u|p|span|code)>"
)


MARKS = re.compile(r"[*_`$~{}]|\\(?:left|right)\b")


class Lettered:
    """A pattern with the letters of options. `pattern` writes them as "A-J" and "a-j". It is compiled when it is used,
    because the patterns of all languages together take half a second."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self.pattern, self.flags = pattern, flags

    @cached_property
    def usual(self) -> re.Pattern[str]:
        """The pattern for letters up to J."""
        return re.compile(self.pattern, self.flags)

    @cached_property
    def all(self) -> re.Pattern[str]:
        """The pattern for letters up to Z."""
        return re.compile(self.pattern.replace("A-J", "A-Z").replace("a-j", "a-z"), self.flags)

    def of(self, letters: Sequence[Any]) -> re.Pattern[str]:
        """The pattern for as many letters or options: up to J, or up to Z if there are more than ten."""
        return self.usual if len(letters) <= USUAL else self.all


LABELLED = Lettered(r"\s*+[(（]?\s*+([A-J])\s*+[)）.、:：]\s*+")


_SMALL = Lettered(
    r"(?<!\w)[(（]([a-j])[)）]"
    r"|(?:(?<=[Aa]nswer is )|(?<=[Aa]nswer: )|(?<=[Oo]ption )|(?<=[Cc]hoice ))([a-j])(?=[^\w\n]*+$|[).])"
    r"|^[^\S\n]*+([a-j])[).]?[^\S\n]*+$|^([a-j])\)", re.MULTILINE
)  # fmt: skip


_LISTED = re.compile(r"(?:^|(?<=\s)|(?<=[.;,)$}]))[(（]?([A-Z])\s*+[)）.、:：]\s*+")


def capitals(text: str, letters: Sequence[Any]) -> str:
    """Capitalize lower-case letters that can only name options: "(b)", "the answer is c."."""
    return _SMALL.of(letters).sub(lambda found: found[0].upper(), text)


def plain_text(text: str, letters: Sequence[Any]) -> str:
    """A text without LaTeX styles and Markdown marks, and with option letters capitalized."""
    return capitals(_unstyled(text), letters)


def _unstyled(text: str) -> str:
    return MARKS.sub(" ", TEXT_STYLE.sub(" ", text))


def bare_words(text: str) -> str:
    """The words of an option for comparison: case-folded, without its letter, styles and closing punctuation."""
    text = re.sub(r"\\[dt]frac", r"\\frac", unlabelled(text))
    return re.sub(r"\s+", " ", _unstyled(text)).strip(" .。,;:，；").casefold().removeprefix("the ")


def unlabelled(option: str) -> str:
    """An option without its letter: "(A) 4" becomes "4"."""
    found = LABELLED.usual.match(option)
    return option[found.end() :] if found else option


def split_options(text: str) -> list[str]:
    """Split a text such as "A) 4 B) 5 C) 6" into options without letters; [] if the text has no such letters."""
    labels: list[re.Match[str]] = []
    for found in _LISTED.finditer(text):
        if found[1] == LETTERS[len(labels) : len(labels) + 1]:
            labels.append(found)
    ends = [*(label.start() for label in labels[1:]), len(text)]
    return [text[label.end() : end].strip() for label, end in zip(labels, ends, strict=False)]


def letters_of(answer: object, options: Sequence[str]) -> str:
    """The letters of a reference answer, sorted: of "B", "(B)", "A B D", the text of an option, or an index (0 is A).

    An index may be a text ("1") if there are options. A text that is a JSON list ('["B", "C"]') names all its letters.
    Letters beyond J are read if there are more than ten options. Raises UsageError if `answer` is none of these, and
    for more than 26 options.
    """
    if len(options) > len(LETTERS):
        raise UsageError(
            f"choices = {len(options)} options: there are letters for {len(LETTERS)}; write at most so many"
        )
    text = answer_text(answer).strip()
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    found = (
        (is_number and _of_index(text, options))
        or _named(text, options, "[{}]", re.IGNORECASE)
        or _of_words(text, options)
        or _named(text, options, "[{}]+")
        or (options and _of_index(text, options))
        or "".join(letters_of(member, options) for member in _members(text))
    )
    if not found:
        raise UsageError(
            f"answer = {answer!r:.200}: is not a letter of an option; write one, such as B, or several, such as ABD"
        )
    return "".join(sorted(set(found)))


class Asked(NamedTuple):
    """What a row asks: its options without letters ([] if unknown), the letters among which a text chooses (at least
    A to E), and those that are right, sorted."""

    options: list[str]
    letters: str
    wanted: str


def asked(columns: Mapping[str, Any]) -> Asked:
    """Read the columns `choices` or `options`, if there are any, and `answer`.

    Options may have labels of their own, as in ARC: {"text": […], "label": ["1", "2", …]}. Raises UsageError as
    `letters_of` does.
    """
    options, answer, given = options_of(columns), columns["answer"], _given(columns)
    labels = [str(label) for label in given.get("label", ())] if isinstance(given, Mapping) else []
    if len(labels) == len(options) and isinstance(answer, str) and answer in labels:
        answer = labels.index(answer)
    wanted = letters_of(answer, options)
    return Asked(options, LETTERS[: max(len(options) or 5, LETTERS.index(wanted[-1]) + 1)], wanted)


def _named(text: str, options: Sequence[str], pattern: str, flags: int = 0) -> str:
    letters = re.sub(r"[\s,、，()（）.;]|\band\b", "", text)
    pattern = pattern.format("A-J" if len(options) <= USUAL else "A-Z")
    return letters.upper() if re.fullmatch(pattern, letters, flags) else ""


def _of_words(text: str, options: Sequence[str]) -> str:
    same = [place for place, option in enumerate(options) if bare_words(option) == bare_words(text)]
    return LETTERS[same[0]] if len(same) == 1 else ""


def _of_index(text: str, options: Sequence[str]) -> str:
    found = re.fullmatch("[0-9]{1,2}", text)
    return LETTERS[int(text)] if found and int(text) < (len(options) or USUAL) else ""


def _members(text: str) -> list[Any]:
    """The members of a JSON list of texts and numbers that is written inside a text; [] for any other text."""
    try:
        members = json.loads(text) if text.startswith("[") else []
    except (ValueError, RecursionError):
        return []
    return members if all(isinstance(member, str | int | float) for member in members) else []


def options_of(columns: Mapping[str, Any]) -> list[str]:
    """The options of a row without letters, from its column `choices` or `options`; [] if it has neither."""
    given = _given(columns)
    if isinstance(given, Mapping):
        given = given.get("text", list(given.values()))
    if isinstance(given, str):
        return [str(option) for option in _members(given)] or split_options(given)
    return without_letters([str(option) for option in given]) if isinstance(given, list | tuple) else []


def _given(columns: Mapping[str, Any]) -> Any:
    return columns["choices"] if columns.get("choices") is not None else columns.get("options")


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without letters if all have one, in order: "A)4", "B)5"; otherwise unchanged ("C. elegans")."""
    pattern = LABELLED.of(options)
    found = [pattern.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(found, LETTERS, strict=False)):
        return [option[match.end() :].strip() for option, match in zip(options, found, strict=True) if match]
    return list(options)
