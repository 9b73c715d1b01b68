"""Step ends in characters and in tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gruppo.errors import RunError, UsageError
from gruppo.rewards.steps import checked_ends, find_split, lines, step_tokens
from gruppo.types import Completion

PIECES = ["<eos>", "one", " two", "\n", ".\n\n", "x\ny", " ", "é", "three"]


def tokenizer_of_pieces() -> PreTrainedTokenizerFast:
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="one"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def completion(ids: list[int], text: str) -> Completion:
    return Completion(tuple(ids), (0.0,) * len(ids), (True,) * len(ids), "stop", 0, text)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", []),
        ("one", [3]),
        ("one\ntwo", [3, 7]),
        ("one  \n\n \n  two \n", [3, 14]),
        ("\n\none", [5]),
        (" \n\t\n", []),
    ],
)
def test_line_ends_exclude_trailing_whitespace(text: str, ends: list[int]) -> None:
    assert lines(text) == ends
    assert checked_ends(lines, text) == ends


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        (["one", " two", "\n", "three", "<eos>"], [1, 3]),
        (["one", ".\n\n", "three", "<eos>"], [1, 2]),  # the full stop belongs to the step
        (["one", " ", "\n", "three"], [0, 3]),
        (["x\ny", "<eos>"], [0]),  # one token contains two ends: one step
        (["x\ny", "one", "<eos>"], [0, 1]),
        (["\n", "<eos>"], []),
    ],
)
def test_the_token_of_an_end_holds_the_last_character_of_the_step(pieces: list[str], tokens: list[int]) -> None:
    text = "".join(piece for piece in pieces if piece != "<eos>")
    sampled = completion([PIECES.index(piece) for piece in pieces], text)
    assert [token for token, _ in step_tokens(sampled, lines(text), tokenizer_of_pieces(), [])] == tokens


def test_character_of_several_tokens_ends_with_its_last_token() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    text = "é😀\nß"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 2 + 4 + 1 + 2
    assert step_tokens(completion(ids, text), lines(text), tokenizer, []) == [(5, 2), (8, 4)]


def test_an_end_after_all_tokens_is_dropped() -> None:
    """A completion that was truncated within a character."""
    assert step_tokens(completion([1], "one and more"), [12], tokenizer_of_pieces(), []) == []


@pytest.mark.parametrize("name", ["words_backwards", "no_ends", "raises"])
def test_an_invalid_rule_is_refused_before_sampling(name: str) -> None:
    with pytest.raises(UsageError, match=r"reward_model\.split"):
        find_split(f"tests/functions_of_users.py:{name}")


@pytest.mark.parametrize("ends", [[0], [3, 3], [5, 2], [99], [1.5], ["1"], None])
def test_ends_must_increase_within_the_text(ends: list) -> None:
    with pytest.raises(RunError, match=r"reward_model\.split: (returns|fails)"):
        checked_ends(lambda text: ends, "some text")


def test_a_blank_text_has_no_steps_whatever_the_rule_returns() -> None:
    assert checked_ends(lambda text: [len(text)], "") == []
    assert checked_ends(lambda text: [len(text)], " \n") == []
    assert checked_ends(lambda text: np.array([1, 3]), "abc") == [1, 3]
