"""Stop strings found in a window of the last tokens are those of the whole text, with every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines import stop_strings
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import CompletionText
from gruppo.engines.llama_cpp import LlamaCppEngine
from gruppo.engines.stop_strings import StopFinder, find_stop
from gruppo.engines.vllm import engine as vllm_engine
from gruppo.utils.token_text import text_tokens, tokens_after
from tests.conftest import make_policy
from tests.engines import vllm_stand_in
from tests.odd_tokenizers import KINDS, byte_level, metaspace

WORDS = [
    "a", " b", "  ", "ab", "\n", "2+2= 4", "\u4e2d\u6587", "\U0001f600", "caf\u00e9", "<think>", "</think>", "{",
    " a\u200db", "\U0001f1e9\U0001f1ea",
]  # fmt: skip


def written_by_a_model(tokenizer: PreTrainedTokenizerFast, source: random.Random, before: Sequence[int]) -> list[int]:
    text = "".join(source.choice(WORDS) for _ in range(source.randrange(15, 40)))
    return tokens_after(tokenizer, text, before)


def any_tokens(tokenizer: PreTrainedTokenizerFast, source: random.Random, before: Sequence[int]) -> list[int]:
    ids = [token for token in range(3, len(tokenizer) + 4) if token != tokenizer.eos_token_id]
    return [source.choice(ids) for _ in range(source.randrange(50, 80))]


def bytes_and_letters(tokenizer: PreTrainedTokenizerFast, source: random.Random, before: Sequence[int]) -> list[int]:
    """Runs of whole and broken characters of several bytes, longer than the window."""
    face, letter = (tokens_after(tokenizer, text, before) for text in ("\U0001f600", "a"))
    tokens: list[int] = []
    for _ in range(3):
        tokens += face * source.randrange(18) + face[: source.randrange(4)] + letter * source.randrange(3)
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [written_by_a_model, any_tokens, bytes_and_letters])
@pytest.mark.parametrize("window", [(5, 9), (16, 48)])
def test_the_window_finds_what_the_whole_text_has(
    kind: str, make: Callable[..., list[int]], window: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in zip(("_LEAST", "_MOST"), window, strict=True):
        monkeypatch.setattr(stop_strings, name, size)
    tokenizer, source, found = KINDS[kind](), random.Random(kind), 0
    text = CompletionText(tokenizer, (int(tokenizer.eos_token_id),))
    for _ in range(5):
        prompt = text_tokens(tokenizer, "Q: a" * source.randrange(1, 30))
        tokens = make(tokenizer, source, prompt)
        written = source.choice([0, 0, source.randrange(len(prompt) + 1)])
        request = Request(tuple(prompt), [(0,)], written=written)
        whole = text.of(request, tokens)
        places = [source.randrange(max(1, len(whole) - 4)) for _ in range(3)]
        stops = {whole[place : place + source.choice([1, 2, 3, 5, 12, 25])] for place in places} - {""} | {
            "never there"
        }
        params = SamplingParams(
            1.0, 200, min_tokens=source.choice([0, 40]), stop=tuple(sorted(stops)), keep_stop=source.random() < 0.5
        )
        finder = StopFinder(text, request, params)
        for count, token in enumerate(tokens, 1):
            expected = find_stop(text, request, tokens[:count], params)
            assert finder.add(token) == expected, (prompt, tokens[:count], params)
            found += expected is not None
    assert found > 5


def test_a_run_of_bytes_longer_than_the_window_that_breaks_at_its_end() -> None:
    """The decoder then rejects all bytes of the run, so its first character, after the "a", becomes another one."""
    tokenizer = metaspace()
    face, letter = (tokens_after(tokenizer, text, ()) for text in ("\U0001f600", "a"))
    text, params = CompletionText(tokenizer, (1,)), SamplingParams(1.0, 200, stop=("a\ufffd",))
    request = Request(tuple(letter), [(0,)])
    tokens = letter + face * 20 + face[:2] + letter
    finder = StopFinder(text, request, params)
    found = [finder.add(token) for token in tokens]
    assert found == [find_stop(text, request, tokens[:count], params) for count in range(1, len(tokens) + 1)]
    assert found[0] is None
    assert found[-1] == 0


@pytest.mark.parametrize("kind", ["metaspace", "byte level"])
def test_the_cost_of_a_token_does_not_depend_on_the_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, source = KINDS[kind](), random.Random(0)
    prompt = text_tokens(tokenizer, "Q: a" * 400)
    tokens = [token for _ in range(40) for token in written_by_a_model(tokenizer, source, prompt)]
    decode, decoded = tokenizer.decode, 0

    def counting(ids: list[int], **options: object) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(decode(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", counting)
    finder = StopFinder(
        CompletionText(tokenizer, (1,)),
        Request(tuple(prompt), [(0,)]),
        SamplingParams(1.0, 9999, stop=("never there",)),
    )
    costs = []
    for token in tokens:
        decoded = 0
        assert finder.add(token) is None
        costs.append(decoded)
    assert len(tokens) > 2000
    assert sum(costs[-500:]) / 500 < 200
    assert max(costs[100:]) < 3000, "the window moved"


def llama_cpp(tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, PreTrainedTokenizerFast]:
    """The engine without llama.cpp: its logits give each of the tokens in turn a probability of 1."""
    tokenizer, engine, left = make_policy().tokenizer, object.__new__(LlamaCppEngine), iter(tokens)
    engine.eos_ids, engine._text = (0,), CompletionText(tokenizer, (0,))
    logits: Callable[..., torch.Tensor] = lambda *_: torch.eye(44)[[next(left)]].log()  # noqa: E731
    monkeypatch.setattr(engine, "_logits", logits)
    return engine, tokenizer


def vllm(tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, PreTrainedTokenizerFast]:
    """The engine without vLLM."""
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(vllm_engine, "start", lambda *_: vllm_stand_in.StandIn(tokens))
    policy = make_policy(vocab_size=44)
    settings = EngineTable(name="vllm", memory="1 GB")
    return vllm_engine.VllmEngine(policy, 4, 5000, settings), policy.tokenizer


@pytest.mark.parametrize("make", [llama_cpp, vllm])
@pytest.mark.parametrize(("stop", "count"), [((), 400), (("never there",), 400), (("aa",), 302)])
def test_engines_decode_no_more_than_a_window_for_each_token(
    make: Callable[..., Any], stop: tuple[str, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the whole text once or twice at the end."""
    letters = {letter: make_policy().tokenizer(letter)["input_ids"][0] for letter in "ab"}
    tokens = [letters[letter] for letter in "ab" * 150 + "aa" + "b" * 98]
    engine, tokenizer = make(tokens, monkeypatch)
    decode, decoded = tokenizer.decode, 0

    def counting(ids: list[int], **options: object) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(decode(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", counting)
    ((completion,),) = engine.generate([Request((5,), [(0,)])], SamplingParams(1.0, 400, stop=stop))
    assert completion.token_ids == tuple(tokens[:count])
    assert completion.text == ("ab" * 150 + "aa" + "b" * 98)[: 300 if stop == ("aa",) else 400]
    assert decoded < (200 * count if stop else 4 * count)


def test_an_eos_token_is_no_part_of_the_text() -> None:
    tokenizer = byte_level()
    eos = int(tokenizer.eos_token_id)
    request, params = Request((5,), [(0,)]), SamplingParams(1.0, 9, stop=("</s>",))
    finder = StopFinder(CompletionText(tokenizer, (eos,)), request, params)
    assert [finder.add(token) for token in (*tokenizer("ab")["input_ids"], eos)] == [None, None]


def test_stop_text_with_characters_of_several_tokens() -> None:
    """A byte-level tokenizer decodes half a character as a replacement character, until the next token completes it."""
    tokenizer = byte_level()
    finder = StopFinder(
        CompletionText(tokenizer, (1,)), Request((5,), [(0,)]), SamplingParams(1.0, 5, stop=("a\u5b8c",))
    )
    assert [finder.add(token) for token in tokenizer("\u0061a\u5b8c")["input_ids"]] == [None, None, None, None, 1]


PIECES = {1: "a", 2: "ab", 3: "bc", 4: "abcd", 5: "c", 6: "\u00e9"}


class Pieces:
    """Tokens of several characters. Like some tokenizers, it strips the first space."""

    chat_template = bos_token = bos_token_id = pad_token = pad_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [next(token for token, piece in PIECES.items() if piece == text)]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [PIECES[token] for token in ids]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(PIECES[token] for token in ids).removeprefix(" ")


@pytest.mark.parametrize(
    ("tokens", "stop", "kept", "removed"),
    [
        ([1, 3, 5], ("bc",), "abc", "a"),
        ([2, 5, 5], ("bc",), "abc", "a"),  # over two tokens
        ([4, 5], ("bc",), "abc", "a"),  # inside one token
        ([4, 5], ("abcd", "b"), "ab", "a"),  # the one that is complete first, as if tokens were characters
        ([2, 3, 5], ("abb", "b"), "ab", "a"),
        ([1, 3], ("abc", "bc", "c"), "abc", ""),  # complete at once: the longest
        ([1, 1, 2], ("aab",), "aaab", "a"),
    ],
)
def test_where_a_stop_string_ends_the_text(tokens: list[int], stop: tuple, kept: str, removed: str) -> None:
    for keep, text in ((True, kept), (False, removed)):
        params = SamplingParams(1.0, len(tokens), stop=stop, keep_stop=keep)
        finder = StopFinder(CompletionText(Pieces(), (0,)), Request((1,), [(0,)]), params)
        ends = [finder.add(token) for token in tokens]
        length, end = next((length, end) for length, end in enumerate(ends, 1) if end is not None)
        assert Pieces().decode(tokens[:length])[:end] == text
