"""Penalties for overlong and for repetitive completions; every value is at most 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import text_of


class Overlong:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13) for a completion of |y| tokens, from -1 to 0.

    0 if |y| <= L - B;  (L - B - |y|) / B if L - B < |y| <= L;  -1 if |y| > L.
    L is `max_tokens`, by default the run's sampling limit. B is `buffer_tokens`, by default L // 4 and at least 1 (the
    paper has B = 4096 and L = 20480). Raises UsageError if either is not a whole number from 1, if B > L, or, when
    called, if the run does not provide L.
    """

    def __init__(self, max_tokens: int | None = None, buffer_tokens: int | None = None) -> None:
        for name, value in (("max_tokens", max_tokens), ("buffer_tokens", buffer_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} = {value!r}: must be a whole number of tokens; write 1 or more")
        if max_tokens is not None and buffer_tokens is not None and buffer_tokens > max_tokens:
            raise UsageError(
                f"buffer_tokens = {buffer_tokens}: is more than max_tokens = {max_tokens}; write at most that many"
            )
        self.max_tokens, self.buffer_tokens = max_tokens, buffer_tokens

    def __call__(self, completion_ids: Sequence[Sequence[int]], trainer_state: Any = None, **_: Any) -> list[float]:
        limit = self.max_tokens or getattr(trainer_state, "max_tokens", None)
        if limit is None:
            raise UsageError("the run provides no max_tokens; set reward.options.overlong.max_tokens")
        buffer_tokens = self.buffer_tokens or max(1, limit // 4)
        return [_overlong(len(ids), limit, buffer_tokens) for ids in completion_ids]


# Scripts that put no spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le and New Tai Lue, Tai Tham,
# Balinese, Han with its radicals, kana, Bopomofo, Yi, Javanese, Cham, Tai Viet and Ahom; and the marks, digits and
# full-width letters of East Asian texts.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf"
    "\u3001-\u303f\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf"
    "\ua980-\ua9ff\uaa00-\uaadf\uf900-\ufaff\ufe10-\ufe19\ufe30-\ufe6b\uff01-\uff9f\uffe0-\uffe6"
    "\U00011700-\U0001174f\U00016fe2-\U00016fe3\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)


_UNIT = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


class Repetition:
    """Repetition penalty ("Demystifying Long Chain-of-Thought Reasoning", arXiv 2502.03373, as in open-r1).

    penalty · (1 - distinct n-grams / all n-grams) over the lower-cased words of a completion, from `penalty` to 0. In
    scripts without spaces between words (Chinese, Japanese, Thai), every character counts as a word, and so does every
    East Asian mark and full-width character. A completion of fewer than n words gets 0, also if it is a long run of
    other characters without spaces. `ngram`: n, in words. `penalty`: the value that a completion approaches
    if it repeats a single n-gram; finite, at most 0. Raises UsageError if either is out of range.
    """

    def __init__(self, ngram: int = 3, penalty: float = -1.0) -> None:
        if not isinstance(ngram, int) or isinstance(ngram, bool) or ngram < 1:
            raise UsageError(f"ngram = {ngram!r}: must be a whole number of words; write 1 or more")
        if not isinstance(penalty, int | float) or not float("-inf") < penalty <= 0:
            raise UsageError(f"penalty = {penalty!r}: must be a finite number of at most 0; write e.g. -1.0")
        self.ngram, self.penalty = ngram, penalty

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [self._penalty(_UNIT.findall(text_of(completion).lower())) for completion in completions]

    def _penalty(self, words: Sequence[str]) -> float:
        grams = [tuple(words[start : start + self.ngram]) for start in range(len(words) - self.ngram + 1)]
        return self.penalty * (1 - len(set(grams)) / len(grams)) if len(set(grams)) < len(grams) else 0.0


def _overlong(length: int, limit: int, buffer_tokens: int) -> float:
    if length <= limit - buffer_tokens:
        return 0.0
    return (limit - buffer_tokens - length) / buffer_tokens if length <= limit else -1.0
