"""Whether questions of an evaluation are among the training questions, word for word or nearly; and recall."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gruppo.data.loading import Dataset
from gruppo.types import Row
from gruppo.utils.text import normalized

NGRAM = 8  # words
NEAR = 0.5  # share of the n-grams of a question that one training question must contain
COMMON = 0.1  # n-grams in more than this share of the training questions are part of the prompt, not of the question
SHOWN = 5

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Overlap:
    """Questions of an evaluation that are also training questions.

    `exact`: the number of questions with the same words; `near`: of others of which a training question contains at
    least the share NEAR of all n-grams. `examples`: some of them, with the training question.
    """

    questions: int
    training: int
    exact: int
    near: int
    examples: list[dict[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def words_of(text: str) -> tuple[str, ...]:
    """The words and signs of a text in normal form. Signs count: 2 + 3 is not 2 - 3."""
    return tuple(_WORD.findall(normalized(text)))


def overlap(questions: Sequence[str], training: Sequence[str]) -> Overlap:
    """How many questions are among the training questions, word for word or nearly.

    A question is near a training question that contains at least the share NEAR of its n-grams of NGRAM words (of all
    its words, if it has fewer). N-grams in more than the share COMMON of all training questions, and in at least ten,
    count for neither: they belong to a common prompt.
    """
    wanted = [words_of(question) for question in questions]
    known = [words_of(question) for question in training]
    same = dict(zip(known, training, strict=True))
    grams = _Index(known, {min(NGRAM, len(words)) for words in wanted if words})
    exact, near = 0, 0
    examples: list[dict[str, str]] = []
    for text, words in zip(questions, wanted, strict=True):
        found = same.get(words)
        if found is not None:
            exact += 1
        elif (place := grams.nearest(words)) is not None:
            near, found = near + 1, training[place]
        if found is not None and len(examples) < SHOWN:
            examples.append({"question": text, "training": found})
    return Overlap(len(questions), len(training), exact, near, examples)


class _Index:
    """The training questions that contain an n-gram, for the lengths n that are needed."""

    def __init__(self, known: Sequence[tuple[str, ...]], lengths: Iterable[int]) -> None:
        self.places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place, words in enumerate(known):
            for length in lengths:
                for gram in _grams(words, length):
                    self.places[gram].append(place)
        self.most = max(10.0, COMMON * len(known))

    def nearest(self, words: tuple[str, ...]) -> int | None:
        """The first training question that contains most n-grams of a question; None if that is less than NEAR."""
        found = [self.places.get(gram, []) for gram in _grams(words, min(NGRAM, len(words)))] if words else []
        telling = [places for places in found if len(places) <= self.most]
        counts = Counter(place for places in telling for place in places)
        if not counts:
            return None
        place, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        return place if count >= NEAR * len(telling) else None


def _grams(words: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    return {words[start : start + length] for start in range(len(words) - length + 1)}


def texts_of(parts: Iterable[Dataset]) -> list[str]:
    """The questions of rows: the column `question`, or else the prompt; of a conversation its last message."""
    return [question_text(row) for part in parts for row in part.rows]


def question_text(row: Row) -> str:
    """See `texts_of`."""
    question, prompt = row.get("question"), row["prompt"]
    if isinstance(question, str):
        return question
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


def recall(questions: Sequence[str], complete: Callable[[Sequence[str]], Sequence[str]]) -> Mapping[str, float]:
    """How well a model knows the texts of questions: it completes each from its first half.

    `complete`: returns a greedy continuation of every text. `exact`: the share of second halves that the continuation
    begins with; `words`: the mean share of the words of the second half that it has at their places, from the start up
    to the first that differs. Compare both with those of new questions of the same kind: some ends can be guessed.
    """
    split = [halves(question) for question in questions]
    exact, shares = 0, []
    for (_, rest), answer in zip(split, complete([first for first, _ in split]), strict=True):
        wanted, given = words_of(rest), words_of(answer)
        agreed = next((place for place, word in enumerate(wanted) if given[place : place + 1] != (word,)), len(wanted))
        exact += agreed == len(wanted)
        shares.append(agreed / len(wanted) if wanted else 1.0)
    return {"questions": len(questions), "exact": exact / len(questions), "words": sum(shares) / len(shares)}


def halves(text: str) -> tuple[str, str]:
    """The text up to a space near its middle, and the rest."""
    text = text.strip()
    middle = text.find(" ", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return text[:middle], text[middle:]
