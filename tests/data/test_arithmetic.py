"""The generated task: no held-out question can occur in training."""

import re

import pytest

from gruppo.data.arithmetic import load
from gruppo.errors import UsageError


def canonical(row: dict) -> tuple:
    a, sign, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", row["prompt"][0]["content"]).groups()
    return (sign, *sorted((int(a), int(b)))) if sign == "+" else (sign, int(a), int(b))


def test_held_out_questions_cannot_occur_in_training() -> None:
    train, test = load("train"), load("test")
    assert len(test) == len({canonical(row) for row in test}) == 256
    assert not {canonical(row) for row in train} & {canonical(row) for row in test}
    assert len({canonical(row) for row in train}) == 231 + 441 - 256


def test_answers_are_correct() -> None:
    for row in load("train") + load("test"):
        question = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?")
        assert int(row["answer"]) == eval(question)


def test_same_questions_every_time() -> None:
    assert load("test") == load("test")
    assert load("train") == load("train")


def test_options() -> None:
    small = load("train", maximum=3, held_out=4, negative=False)
    assert all(not row["answer"].startswith("-") for row in small)
    assert len(load("test", maximum=3, held_out=4)) == 4


@pytest.mark.parametrize("options", [{"maximum": 0}, {"maximum": "many"}, {"held_out": 0}, {"held_out": 10**6}])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        load("train", **options)


def test_other_splits_are_refused_rather_than_read_as_train() -> None:
    with pytest.raises(UsageError, match="validation"):
        load("validation")
