"""Texts of tokens and tokens of texts are those of the whole sequence, with every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from gruppo.utils.token_text import (
    UNDECODABLE,
    TokenTexts,
    closing_tokens,
    ids_without_text,
    silent_ids,
    text_of,
    text_tokens,
    tokens_after,
    visible_text,
)
from tests.odd_tokenizers import CHATML, byte_level, closing, ids_of, metaspace, prepending
from tests.odd_tokenizers import KINDS as PLAIN_KINDS

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = PLAIN_KINDS | {
    "closing metaspace": lambda: closing(metaspace()),
    "closing byte level": lambda: closing(byte_level()),
}
TEXTS = [
    "a b", " a b", "ab  ab", "2+2= 4", "\u4e2d\u6587 a", "a \U0001f600\U0001f600 b", "\n\na \n b",
    "  a", "<think>\na</think> b<tool_call>{",
    "caf\u00e9 \U0001f1e9\U0001f1ea a\u200db",
]  # fmt: skip


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_the_parts_joined_are_the_text_of_the_whole(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = text_tokens(tokenizer, f"Q: {text}")
    if "<think>" not in text:  # some tokenizers put a space after each special token
        assert text_of(tokenizer, ids).removeprefix(" ") == f"Q: {text}"
    for cut in range(1, len(ids)):
        first, rest = text_of(tokenizer, ids[:cut]), text_of(tokenizer, ids[cut:], ids[:cut])
        joined = first.rstrip(UNDECODABLE) + rest  # cut within a character, the second part has it
        assert joined == text_of(tokenizer, ids), cut


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_tokens_joined_are_the_text_and_no_token_has_half_a_character(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    before = text_tokens(tokenizer, "Q:")
    ids = tokens_after(tokenizer, text, before)
    texts = TokenTexts(tokenizer).of(ids, before)
    assert len(texts) == len(ids)
    assert "".join(texts) == text_of(tokenizer, ids, before)
    assert not any(UNDECODABLE in piece for piece in texts)


@pytest.mark.parametrize("text", [text for text in TEXTS if "<think>" not in text])
def test_tokens_after_others_add_exactly_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for prompt in ("Q:", "Q: a ", "\u4e2d", "a\n", "Q: 2+2="):
        before = text_tokens(tokenizer, prompt)
        ids = tokens_after(tokenizer, text, before)
        assert text_of(tokenizer, ids, before) == text
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)


@pytest.mark.parametrize("kind", ["metaspace", "byte level"])
def test_a_cut_within_a_character_keeps_all_characters_before_it(kind: str) -> None:
    tokenizer = KINDS[kind]()
    before = text_tokens(tokenizer, "\u4e2d")
    ids = tokens_after(tokenizer, "\u6587\U0001f600", before)
    assert len(ids) == 7
    texts = [text_of(tokenizer, ids[:count], before) for count in range(1, 8)]
    assert [text.rstrip(UNDECODABLE) for text in texts] == ["", "", *["\u6587"] * 4, "\u6587\U0001f600"]
    assert [text.endswith(UNDECODABLE) for text in texts] == [True, True, False, True, True, True, False]
    assert TokenTexts(tokenizer).of(ids, before) == ["", "", "\u6587", "", "", "", "\U0001f600"]
    assert [text.rstrip(UNDECODABLE) for text in TokenTexts(tokenizer).of(ids[:5], before)] == [
        "",
        "",
        "\u6587",
        "",
        "",
    ]


def test_a_leading_space_is_kept_after_a_prompt_and_not_at_the_start_of_a_text() -> None:
    tokenizer = metaspace()
    ids = ids_of(tokenizer, "▁4")
    assert text_of(tokenizer, ids, text_tokens(tokenizer, "2+2=")) == " 4"
    assert text_of(tokenizer, ids) == "4"
    assert text_of(tokenizer, ids, [tokenizer.bos_token_id]) == "4"


def test_special_tokens_are_in_the_text_except_bos_and_padding() -> None:
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "<s>", "<think>", "a", "</think>", "<pad>", "b", "<tool_call>", "<|im_end|>")
    assert text_of(tokenizer, ids) == "<think>a</think>b<tool_call><|im_end|>"
    assert visible_text(tokenizer, ids) == "<s><think>a</think><pad>b<tool_call><|im_end|>"
    assert TokenTexts(tokenizer).of(ids)[:4] == ["", "<think>", "a", "</think>"]
    assert TokenTexts(tokenizer, special=True).of(ids)[4] == "<pad>"


def test_marks_of_turns_are_in_the_text_though_they_are_declared_as_bos_and_padding() -> None:
    tokenizer = byte_level(template=CHATML)
    tokenizer.bos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>"
    assert silent_ids(tokenizer) == frozenset()
    ids = ids_of(tokenizer, "a", "<|im_end|>", "Ċ", "<|im_start|>", "b")
    assert text_of(tokenizer, ids) == "a<|im_end|>\n<|im_start|>b"


def test_ids_without_text_are_visible_and_do_not_join_the_bytes_around_them() -> None:
    for tokenizer in (byte_level(), metaspace()):
        size = len(tokenizer)
        assert ids_without_text(tokenizer, range(size + 7)) == frozenset(range(size, size + 7))
        first, second, third = tokens_after(tokenizer, "\u4e2d", text_tokens(tokenizer, "a"))
        a = ids_of(tokenizer, "a")[0]
        assert text_of(tokenizer, [a, size + 2, a]) == f"a{UNDECODABLE}a"
        assert set(text_of(tokenizer, [first, second, size, third], [a])) == {UNDECODABLE}
        assert set(text_of(tokenizer, [third], [a, first, second, size])) == {UNDECODABLE}
        assert TokenTexts(tokenizer).of([a, size + 2, a, size], [a]) == ["a", UNDECODABLE, "a", UNDECODABLE]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_tokens_of_any_sequence_joined_are_its_text(kind: str) -> None:
    tokenizer, source = KINDS[kind](), random.Random(0)
    size = len(tokenizer) + 5
    for _ in range(60):
        before = [source.randrange(size) for _ in range(source.randrange(4))]
        ids = [source.randrange(size) for _ in range(source.randrange(1, 12))]
        texts = TokenTexts(tokenizer).of(ids, before)
        assert len(texts) == len(ids)
        assert "".join(texts) == text_of(tokenizer, ids, before)


def test_a_prompt_gets_bos_once_and_never_eos() -> None:
    tokenizer = closing(metaspace())
    assert closing_tokens(tokenizer) == 1
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = text_tokens(tokenizer, "a b")
    assert ids[0] == bos
    assert eos not in ids
    assert text_tokens(tokenizer, "<s>a b").count(bos) == 1
    assert text_tokens(tokenizer, "a</s>")[-1] == eos, "written in the text"
    assert text_tokens(tokenizer, "a</s>").count(eos) == 1
    assert closing_tokens(byte_level()) == 0
    assert text_tokens(byte_level(), "a b") == byte_level()("a b")["input_ids"]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_tokens_after_a_special_token_are_those_of_the_whole(scheme: str) -> None:
    tokenizer = metaspace(scheme)
    whole = tokenizer("a<|im_end|>\nb", add_special_tokens=False)["input_ids"]
    end = whole.index(ids_of(tokenizer, "<|im_end|>")[0]) + 1
    assert tokens_after(tokenizer, "\nb", whole[:end]) == whole[end:]


def test_text_never_becomes_a_special_token_unless_it_may() -> None:
    for tokenizer in (metaspace(), byte_level(), prepending()):
        before, think = text_tokens(tokenizer, "Q:"), ids_of(tokenizer, "<think>")[0]
        assert think in tokens_after(tokenizer, "a<think>", before)
        ids = tokens_after(tokenizer, "a<think>", before, special=False)
        assert think not in ids
        assert text_of(tokenizer, ids, before) == "a<think>"
