"""Stop strings, found while a completion grows, at a cost per token that does not depend on its length."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.completions import CompletionText
from gruppo.utils.token_text import CONTEXT_TOKENS, ids_without_text, shared_length, text_of

_LEAST, _MOST = 16, 48  # tokens of the window after it was moved, and when it is moved
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token of one byte: decoders join a run of them, and may reject all of it


class StopFinder:
    """Finds the stop string that a completion's last token completed. One for each completion.

    Only a window of the last tokens is decoded, in the context of the tokens before it. The window begins where the
    text is divided exactly: the texts of both sides, joined, are the text of the whole. A run of single bytes is never
    divided. A stop string that is found in the window is looked up again in the whole text, so no completion is ended
    by a text that it does not have.
    """

    def __init__(self, text: CompletionText, request: Request, params: SamplingParams) -> None:
        self._text, self._request, self._params = text, request, params
        self._sampled: list[int] = []
        self._tokens = list(request.token_ids[-request.written - CONTEXT_TOKENS :])  # context, then the window
        self._start = max(0, len(self._tokens) - request.written)  # where the window begins
        self._reach = max(map(len, params.stop)) - 1  # characters before a changed one that can belong to a stop string
        self._before = ""  # the last of the characters before the window
        self._window = self._decoded(self._start, len(self._tokens))

    def add(self, token: int) -> int | None:
        """Where a stop string that this token completed ends the text of the completion; None if it completed none."""
        self._sampled.append(token)
        if token in self._text.eos_ids:  # no part of the text
            return None
        self._tokens.append(token)
        before, now = self._before + self._window, self._before + self._decoded(self._start, len(self._tokens))
        self._window = now[len(self._before) :]
        same = shared_length(before, now)
        found = any(now.find(stop, max(0, same - len(stop) + 1)) >= 0 for stop in self._params.stop)
        if len(self._tokens) - self._start >= _MOST:
            self._move()
        return find_stop(self._text, self._request, self._sampled, self._params) if found else None

    def _move(self) -> None:
        """Let the window begin later, at the last possible place that leaves it enough tokens, if there is one."""
        end = len(self._tokens)
        for start in range(end - _LEAST, max(self._start, end - _MOST), -1):
            if not self._divisible(self._tokens[start - 1 : start + 1]):
                continue
            left, right = self._decoded(self._start, start), self._decoded(start, end)
            if left + right == self._window:
                kept = start - CONTEXT_TOKENS
                self._before = (self._before + left)[-self._reach :] if self._reach else ""
                self._tokens, self._start, self._window = self._tokens[max(0, kept) :], start - max(0, kept), right
                return

    def _divisible(self, pair: list[int]) -> bool:
        tokenizer = self._text.tokenizer
        if ids_without_text(tokenizer, pair):
            return False
        return not all(_BYTE.fullmatch(piece) for piece in tokenizer.convert_ids_to_tokens(pair))

    def _decoded(self, start: int, end: int) -> str:
        return text_of(
            self._text.tokenizer, self._tokens[start:end], self._tokens[max(0, start - CONTEXT_TOKENS) : start]
        )


def find_stop(text: CompletionText, request: Request, tokens: Sequence[int], params: SamplingParams) -> int | None:
    """Where a stop string that the last of the `tokens` completed ends the text; None if it completed none.

    All tokens so far are decoded, because the text of a token can depend on the tokens before it. Of several stop
    strings, the one that is complete first counts, so that it does not matter how the text is split into tokens.
    """
    if len(tokens) < params.min_tokens:
        return None
    now, before = text.of(request, tokens), text.of(request, tokens[:-1])
    same = shared_length(before, now)  # the last token of a character changes the text of its first ones
    found = [(now.find(stop, max(0, same - len(stop) + 1)), len(stop)) for stop in params.stop]
    complete = [(start + size, start) for start, size in found if start >= 0]
    if not complete:
        return None
    end, start = min(complete)
    return end if params.keep_stop else start
