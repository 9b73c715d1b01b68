"""Word problems whose answer is a number or words: "Mrs. Hilt", "Richard's recipe", "They are equal"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gruppo.data.options import MARKS, TEXT_STYLE
from gruppo.data.references import listed_in
from gruppo.errors import UsageError
from gruppo.rewards.grading.extraction import decisions, last_sentence, own_answer, sentence

LONGEST = 1000  # characters of a passage that is read


_AND = re.compile(r"\s*+(?:,\s*+(?:and\b)?|\band\b|;)\s*+|\\(?:text|mathrm)\s*+\{\s*+and\s*+\}")


_TITLE = re.compile(r"\b(Mrs?|Ms|Miss|Dr|Prof)\b\.?\s+")


_SAME = re.compile(r"\b(?:equal(?:ly)?|same|ti(?:e|ed)|neither|identical|no difference|as (?:much|many) as)\b")


# Other ways of saying "the same": "they both have 5", "no one has more".
_ALIKE = re.compile(
    r"\b(?:both|each)(?: [a-z]+){1,3}? \d[\d.,]*+(?!.*\b(?:together|total|altogether|combined|respectively|and \d))"
    r"|\b(?:no one|nobody|none)(?: \w+){1,3}? (?:more|less|fewer|\w{2,12}er)\b(?!.*\bthan\b)"
)


_DENIED = re.compile(r"\b(?:not|never|cannot)\b|n['’]t\b")


# Words that introduce what the answer is compared with, not the answer.
_OTHER = re.compile(
    r"\b(?:than|compared (?:to|with)|unlike|instead of|rather than|not|versus|vs|over|while|whereas|but not|and not)\b"
    r"[^,;]*?(?:[,;]|\bbut\b|$)"
)


def is_numeric(answer: object) -> bool:
    """Whether a reference answer is a number, in digits or in words: "9 (apples)", "three"."""
    from gruppo.rewards.grading.numbers import reference_numbers

    if any(letter.isdigit() for letter in str(answer)):
        return True
    try:
        reference_numbers(answer)
    except UsageError:
        return False
    return True


def grade_word_problem(text: str, answer: object, question: str = "") -> bool:
    """Whether a text gives the reference answer: a number as `grade_number` reads it, else words.

    Words match regardless of case, articles, titles and punctuation. A sentence names the reference if it names it
    first among the names of the question, apart from what it only compares with ("more than Jacob"). Of a list written
    inside a text, the text must give all items. Raises UsageError if `answer` is empty.
    """
    if is_numeric(answer):
        from gruppo.rewards.grading.numbers import grade_number

        return grade_number(text, answer, question)
    wanted = _words(str(answer))
    if not wanted:
        raise UsageError(f"answer = {answer!r}: is empty; write a number or words")
    passage, whole = stated(text)
    said = _words(passage)
    if not said:
        return False
    if items := listed_in(str(answer)):
        return sorted(map(_words, items)) == sorted(map(_words, listed_in(passage) or _AND.split(passage)))
    if said == wanted or (whole and _names(said, wanted)):
        return True
    if _SAME.search(wanted):
        return bool(_SAME.search(said) or _ALIKE.search(said)) and not _DENIED.search(said)
    if _SAME.search(said) and not re.search(r"\bnot (?:equal|the same|tied)\b", said):
        return False
    if wanted in ("yes", "no"):
        return _yes_or_no(said, _words(question)) == wanted
    first = wanted.split(maxsplit=1)[0]
    others = [
        name
        for name in names(question)
        if not _overlap(name, wanted) and f"{name} {first}" not in _words(question)  # "Mr. Hoover's History class"
    ]
    said = _concluded(said, [*_forms(wanted), *others])
    subject = _OTHER.sub(lambda found: " " * len(found[0]), said)
    place = min((_place(subject, form) for form in _forms(wanted)), default=len(subject))
    return place < len(subject) and all(_place(subject, name) > place for name in others) and not _denied(said, place)


_CONCLUSION = re.compile(
    r".*\b(?:so|therefore|thus|hence|which means(?: that)?|this means(?: that)?)\b,?\s*(?!that\b|far\b)"
)
_CONDITION = re.compile(
    r"(?:starting|beginning|counting|from|after|before|if|when|since|because|given|as|with)\b[^,]*+,\s*"
)


def _concluded(said: str, known: Sequence[str]) -> str:
    """The part of a sentence that concludes: after its last "so", and without a condition before it, if that part has a
    known name.
    """
    for pattern in (_CONCLUSION, _CONDITION):
        found = pattern.match(said)
        if found and any(_place(said[found.end() :], name) < len(said) - found.end() for name in known):
            said = said[found.end() :]
    return said


_VERB_DENIED = re.compile(
    r"\b(?:(?:is|are|was|were|do|does|did|can|could|will|would|has|have|had) not|cannot|\w+n't)\b"
)
_UNSURE = re.compile(r"\b(?:clear|sure|known?|say|tell|determined?|certain|information|possible to)\b")
_EMPTY = frozenset(["so", "therefore", "thus", "hence", "indeed", "it", "he", "she", "they", "that", "this", "there"])


def _yes_or_no(said: str, question: str) -> str:
    """The answer "yes" or "no" that a sentence gives with its first word, or by repeating or denying the question."""
    first = said.split(maxsplit=1)[0].strip(",;")
    if first in ("yes", "no") or _UNSURE.search(said):
        return first
    if len(_VERB_DENIED.findall(said)) == 1:
        return "no"
    words = set(re.findall(r"\w+", said)) - _EMPTY
    return "yes" if words and words <= set(re.findall(r"\w+", question)) and not _DENIED.search(said) else ""


def stated(text: str) -> tuple[str, bool]:
    """The passage in which a text states its answer, and whether all of the passage is the answer (a box or tags)."""
    text = own_answer(text)
    if found := decisions(text):
        whole = found[-1].rule in ("boxed", "tags")
        return (found[-1].text if whole else sentence(_without_titles(found[-1].text)))[:LONGEST], whole
    return last_sentence(_without_titles(text))[-LONGEST:], False


def names(question: str) -> list[str]:
    """Names in a question: capitalized words, or runs of them, that do not only begin a sentence."""
    found = set()
    for run in _NAME.findall(_without_titles(question)):
        words = run.split()
        while words and _STARTS.fullmatch(words[0]):
            del words[0]
        found.add(_words(" ".join(words)))
    return sorted(name for name in found if name)


_NAME = re.compile(r"\b[A-Z][\w’']*(?:\s+[A-Z][\w’']*)*")


_STARTS = re.compile(
    r"After|All?|An|And|Are|At|Before|By|Can|Did|Do|Does|Each|For|From|He|Her|His|How|If|In|Is|It|Its|Last|On|One|She|"
    r"Some|The|Their|Then|There|They|This|To|Today|Was|When|Where|Which|While|Who|Whose|Will|With|Would|Yesterday"
)


def _without_titles(text: str) -> str:
    """A text without the points after titles, which do not end a sentence."""
    return _TITLE.sub(r"\1 ", text)


def _words(text: str) -> str:
    """Words of a text for comparison: case-folded, without styles, titles, units in brackets, articles and marks."""
    text = MARKS.sub(" ", TEXT_STYLE.sub(" ", _TITLE.sub(" ", re.sub(r"\([^()]*\)", " ", text))))
    text = re.sub(r"['’]s\b|s['’](?=\s|$)", "", text.replace("’", "'"))
    text = re.sub(r"[^\w',;-]+", " ", text).casefold()
    return re.sub(r"\b(?:the|an?)\b\s*", "", text).strip(" ,;'-")


def _forms(wanted: str) -> Iterator[str]:
    """The reference and its first word, which is its name in "richard recipe" ("Richard's recipe")."""
    yield wanted
    if len(wanted.split()) == 2:
        yield wanted.split(maxsplit=1)[0]


def _names(said: str, wanted: str) -> bool:
    """Whether the content of a box is the reference without its last words: "Adams County", "Richard"."""
    return wanted.startswith(f"{said} ") or said.startswith(f"{wanted} ")


def _overlap(name: str, wanted: str) -> bool:
    return bool(set(name.split()) & set(wanted.split()))


def _place(text: str, words: str) -> int:
    """Where a text has these words; its length if nowhere."""
    found = re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", text)
    return found.start() if found else len(text)


def _denied(text: str, place: int) -> bool:
    """Whether the words before or after a place deny it: "it is not Clara", "Clara does not"."""
    before: Sequence[str] = text[:place].split()[-2:]
    after = text[place:].split()[1:5]
    return bool(_DENIED.search(" ".join([*before, *after])))
