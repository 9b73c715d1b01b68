"""Penalties for completions that are too long or that repeat themselves; none of them is ever above 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import text_of


class Overlong:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13), over the tokens |y| of a completion.

    0 where |y| <= L - B;  (L - B - |y|) / B where L - B < |y| <= L;  -1 above L.
    L: `max_tokens`, by default that of the run's sampling; B: `buffer_tokens`, by default L // 4, at least 1 (the
    paper's 4096 of 16384).
    """

    def __init__(self, max_tokens: int | None = None, buffer_tokens: int | None = None) -> None:
        for name, value in (("max_tokens", max_tokens), ("buffer_tokens", buffer_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} = {value!r}: must be a number of tokens; write 1 or more")
        if max_tokens is not None and buffer_tokens is not None and buffer_tokens > max_tokens:
            raise UsageError(
                f"buffer_tokens = {buffer_tokens}: is more than max_tokens = {max_tokens}; write a part of it"
            )
        self.max_tokens, self.buffer_tokens = max_tokens, buffer_tokens

    def __call__(self, completion_ids: Sequence[Sequence[int]], trainer_state: Any = None, **_: Any) -> list[float]:
        most = self.max_tokens or getattr(trainer_state, "max_tokens", None)
        if most is None:
            raise UsageError("the run tells no max_tokens; write reward.options.overlong.max_tokens")
        buffer = self.buffer_tokens or max(1, most // 4)
        return [_overlong(len(ids), most, buffer) for ids in completion_ids]


class Repetition:
    """Repetition penalty ("Demystifying Long Chain-of-Thought Reasoning", arXiv 2502.03373, as in open-r1).

    penalty · (1 - distinct n-grams / all n-grams), over the words of a completion in lower case; 0 for fewer than n.
    `ngram`: n; `penalty`: at most 0, what a completion comes near to that is one n-gram over and over.
    """

    def __init__(self, ngram: int = 3, penalty: float = -1.0) -> None:
        if not isinstance(ngram, int) or isinstance(ngram, bool) or ngram < 1:
            raise UsageError(f"ngram = {ngram!r}: must be a number of words; write 1 or more")
        if not isinstance(penalty, int | float) or not float("-inf") < penalty <= 0:
            raise UsageError(f"penalty = {penalty!r}: must be a number that is not above 0; write e.g. -1.0")
        self.ngram, self.penalty = ngram, penalty

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [self._penalty(text_of(completion).lower().split()) for completion in completions]

    def _penalty(self, words: Sequence[str]) -> float:
        grams = [tuple(words[start : start + self.ngram]) for start in range(len(words) - self.ngram + 1)]
        return self.penalty * (1 - len(set(grams)) / len(grams)) if len(set(grams)) < len(grams) else 0.0


def _overlong(length: int, most: int, buffer: int) -> float:
    if length <= most - buffer:
        return 0.0
    return (most - buffer - length) / buffer if length <= most else -1.0
