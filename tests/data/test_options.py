"""Options of multiple-choice questions and the letters of references."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.data.options import LETTERS, asked, letters_of, split_options
from gruppo.errors import UsageError

CITIES = ["Paris", "London", "Berlin", "Madrid"]
TWELVE = [f"option {number}" for number in range(12)]


@pytest.mark.parametrize(
    ("answer", "options", "letters"),
    [
        ("B", CITIES, "B"), ("b", CITIES, "B"), ("(B)", CITIES, "B"), ("B.", CITIES, "B"), ("C, A", CITIES, "AC"),
        ("AD", [], "AD"), ("London", CITIES, "B"), (1, CITIES, "B"), (1.0, CITIES, "B"), (1, [], "B"),
        ("1", CITIES, "B"), ("0", CITIES, "A"), ("1", ["4", "2", "1"], "C"), (1, ["4", "2", "1"], "B"),
        ("5", ["4", "5", "6"], "B"), (5, ["4", "5", "6"], "B"), ("4", ["0", "4", "8", "12", "16"], "B"),
        ("BAD", ["GOOD", "BAD"], "B"), ("True", ["True", "False"], "A"), (True, ["yes", "True"], "B"),
        ('["B","C"]', CITIES, "BC"), ('["C", "B"]', [], "BC"), ("[1, 2]", CITIES, "BC"),
        ('["London", "Berlin"]', CITIES, "BC"), ('["B"]', CITIES, "B"),
        ("K", TWELVE, "K"), ("l", TWELVE, "L"), ("11", TWELVE, "L"), ("A, K", TWELVE, "AK"), ("option 10", TWELVE, "K"),
    ],
)  # fmt: skip
def test_letters_of_a_reference(answer: Any, options: list[str], letters: str) -> None:
    assert letters_of(answer, options) == letters


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("K", CITIES), ("K", []), ("Rome", CITIES),
        ("PARIS", []), ("4", CITIES), (4, CITIES), ("1", []), ("-1", CITIES),
        ("1.5", CITIES), ("[]", CITIES), ('["B", "Rome"]', CITIES), ('[["B"]]', CITIES), ("[B", CITIES), ("", CITIES),
        ("A", ["x"] * 27),
    ],
)  # fmt: skip
def test_references_that_name_no_option(answer: Any, options: list[str]) -> None:
    with pytest.raises(UsageError):
        letters_of(answer, options)


def test_options_and_letters_of_a_row() -> None:
    assert asked({"answer": "B"}) == ([], "ABCDE", "B")
    assert asked({"answer": "G"}) == ([], "ABCDEFG", "G")
    assert asked({"answer": "B", "choices": CITIES}) == (CITIES, "ABCD", "B")
    assert asked({"answer": "B", "choices": None, "options": "A) 4 B) 5"}).options == ["4", "5"]
    assert asked({"answer": "B", "choices": '["Paris", "London"]'}).options == CITIES[:2]
    assert asked({"answer": "K", "choices": TWELVE}) == (TWELVE, LETTERS[:12], "K")


def test_labels_of_a_row_come_before_indices() -> None:
    choices = {"text": CITIES, "label": ["1", "2", "3", "4"]}
    assert asked({"answer": "2", "choices": choices}).wanted == "B"
    assert asked({"answer": "B", "choices": {**choices, "label": list("ABCD")}}).wanted == "B"


def test_texts_with_more_than_ten_options() -> None:
    text = " ".join(f"({letter}) {word}" for letter, word in zip(LETTERS, TWELVE, strict=False))
    assert split_options(text) == TWELVE
    assert asked({"answer": "K", "choices": [f"{LETTERS[place]}. {word}" for place, word in enumerate(TWELVE)]}) == (
        TWELVE, LETTERS[:12], "K"
    )  # fmt: skip
