"""Parts of the native engine."""

from dataclasses import replace

import numpy as np
import pytest

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import _Decoder
from tests.conftest import make_policy
from tests.odd_tokenizers import byte_level


def test_stop_text_with_characters_of_several_tokens() -> None:
    """A byte-level tokenizer decodes half a character as a replacement character, until the next token completes it."""
    tokenizer = byte_level()
    policy = replace(make_policy(), tokenizer=tokenizer)
    options = SamplingParams(1.0, 5, stop=("a\u5b8c",))
    decoder = _Decoder(policy, 1, [Request((1,), [(0,)])], options)
    decoder.scheduler.tokens[0] = tokenizer("\u0061a\u5b8c")["input_ids"]
    stops = {}
    for length in range(1, 6):
        decoder.scheduler.length[0] = length
        stops[length] = decoder._find_stops(np.arange(1))
    assert stops == {1: {}, 2: {}, 3: {}, 4: {}, 5: {0: 1}}


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
    policy = replace(make_policy(), tokenizer=Pieces())
    for keep, text in ((True, kept), (False, removed)):
        options = SamplingParams(1.0, len(tokens), stop=stop, keep_stop=keep)
        decoder = _Decoder(policy, 1, [Request((1,), [(0,)])], options)
        decoder.scheduler.tokens[0] = tokens
        for length in range(1, len(tokens) + 1):
            decoder.scheduler.length[0] = length
            if ends := decoder._find_stops(np.arange(1)):
                assert policy.tokenizer.decode(tokens[:length])[: ends[0]] == text
                break
        else:
            raise AssertionError("the stop string was not found")
