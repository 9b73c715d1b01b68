"""Options of multiple-choice questions, and the letters of their reference answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.errors import UsageError

LETTERS = "ABCDEFGHIJ"


TEXT_STYLE = re.compile(
    r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|mbox|boldsymbol|bf|rm|operatorname)\b\s*|\\[()\[\]!,; ]"
    r"|</?(?:b|strong|i|em|u|p|span|code)>"
)


MARKS = re.compile(r"[*_`$~{}]|\\(?:left|right)\b")


LABELLED = re.compile(r"\s*[(（]?\s*([A-J])\s*[)）.、:：]\s*")


_SMALL = re.compile(
    r"(?<!\w)[(（]([a-j])[)）]|(?<=[Aa]nswer is )([a-j])(?=\W*$|[).])|(?<=[Aa]nswer: )([a-j])(?=\W*$|[).])"
    r"|(?<=[Oo]ption )([a-j])(?=\W*$|[).])|(?<=[Cc]hoice )([a-j])(?=\W*$|[).])"
    r"|^\s*([a-j])[).]?\s*$|^([a-j])\)", re.MULTILINE
)  # fmt: skip


def capitals(text: str) -> str:
    """Capitalize lower-case letters that can only name options: "(b)", "the answer is c."."""
    return _SMALL.sub(lambda found: found[0].upper() if found.lastindex else found[0], text)


def plain_text(text: str) -> str:
    """A text without LaTeX styles and Markdown marks, and with option letters capitalized."""
    return capitals(MARKS.sub(" ", TEXT_STYLE.sub(" ", text)))


def bare_words(text: str) -> str:
    """The words of an option for comparison: case-folded, without its letter, styles and closing punctuation."""
    text = re.sub(r"\\[dt]frac", r"\\frac", unlabelled(text))
    return re.sub(r"\s+", " ", plain_text(text)).strip(" .。,;:，；").casefold().removeprefix("the ")


def unlabelled(option: str) -> str:
    """An option without its letter: "(A) 4" becomes "4"."""
    found = LABELLED.match(option)
    return option[found.end() :] if found else option


def split_options(text: str) -> list[str]:
    """Split a text such as "A) 4 B) 5 C) 6" into options without letters; [] if the text has no such letters."""
    options: list[str] = []
    place = 0
    for letter in LETTERS:
        found = re.compile(rf"(?:^|(?<=\s)|(?<=[.;,)$}}]))[(（]?{letter}\s*[)）.、:：]\s*").search(text, place)
        if found is None:
            break
        if options or letter != "A":
            options[-1] = text[place : found.start()].strip()
        options.append("")
        place = found.end()
    if options:
        options[-1] = text[place:].strip()
    return options


def letters_of(answer: object, options: Sequence[str]) -> str:
    """The letters of a reference answer, sorted: of "B", "(B)", "A B D", an index (0 is A), or the text of an option.

    Raises UsageError if `answer` is none of these.
    """
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < (len(options) or len(LETTERS)):
        return LETTERS[answer]
    text = str(answer).strip()
    named = re.sub(r"[\s,、，()（）.;]|\band\b", "", text)
    if re.fullmatch("[A-J]+", named) or re.fullmatch("[a-j]", named):
        return "".join(sorted(set(named.upper())))
    same = [place for place, option in enumerate(options) if bare_words(option) == bare_words(text)]
    if len(same) == 1:
        return LETTERS[same[0]]
    raise UsageError(
        f"answer = {answer!r}: is not a letter of an option; write one, such as B, or several, such as ABD"
    )


def options_of(columns: Mapping[str, Any]) -> list[str]:
    """The options of a row without letters, from its column `choices` or `options`; [] if it has neither."""
    given = columns.get("choices", columns.get("options"))
    if isinstance(given, Mapping):
        given = given.get("text", list(given.values()))
    if isinstance(given, str):
        return split_options(given)
    return without_letters([str(option) for option in given]) if isinstance(given, list | tuple) else []


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without letters if all have one, in order: "A)4", "B)5"; otherwise unchanged ("C. elegans")."""
    found = [LABELLED.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(found, LETTERS, strict=False)):
        return [unlabelled(option).strip() for option in options]
    return list(options)
