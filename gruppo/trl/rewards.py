"""TRL's reward functions under their names there, made of gruppo's, which grade more strictly or in more forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import text_of
from gruppo.rewards.answers import MathVerify
from gruppo.rewards.format import think_format
from gruppo.rewards.length import Overlong

_verify = cache(MathVerify)
Scores = list[float | None]


def accuracy_reward(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> Scores:
    """1 if the answer of a completion equals the solution mathematically, else 0; None if that cannot be read.

    gruppo's reward `math_verify`.
    """
    return _verify()(completions, solution=list(solution))


def reasoning_accuracy_reward(
    completions: Sequence[Any], solution: Sequence[str], reasoning_delimiters: Sequence[str] = ("</think>",), **_: Any
) -> Scores:
    """As `accuracy_reward`, for what follows the first of the delimiters that a completion has; 0 if it has none."""
    texts = [text_of(completion) for completion in completions]
    ends = [next((end for end in reasoning_delimiters if end in text), None) for text in texts]
    answers = ["" if end is None else text.split(end)[-1] for text, end in zip(texts, ends, strict=True)]
    scores = accuracy_reward(answers, solution)
    return [0.0 if end is None else score for score, end in zip(scores, ends, strict=True)]


def think_format_reward(completions: Sequence[Any], **more: Any) -> list[float]:
    """1 if an answer is one block <think>…</think> and what follows it, else 0. gruppo's reward `think_format`."""
    return think_format(completions, prompts=more.get("prompts"))


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """DAPO's penalty of long completions, with these numbers of tokens. gruppo's reward `overlong`."""
    penalty = Overlong(max_completion_len, soft_punish_cache)

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return penalty(completion_ids)

    return soft_overlong_punishment_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """(1 - distinct / all) × `max_penalty` over the n-grams of token ids (arXiv 2502.03373, Appendix C.2).

    0 for a completion of fewer than `ngram_size` tokens. Raises UsageError for a `max_penalty` above 0.
    """
    if max_penalty > 0:
        raise UsageError(f"max_penalty = {max_penalty}: must not be above 0")

    def repetition_penalty_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        grams = [[tuple(ids[n : n + ngram_size]) for n in range(len(ids) - ngram_size + 1)] for ids in completion_ids]
        return [(1 - len(set(row)) / len(row)) * max_penalty if row else 0.0 for row in grams]

    return repetition_penalty_reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., Scores]:
    """A reward for correct, short answers (arXiv 2502.03373, Appendix C.1): from the value of 0 tokens to that of
    `max_len` tokens along half a cosine. Correct: from `max_value_correct` to `min_value_correct`; wrong: from
    `min_value_wrong` to `max_value_wrong`; None as in `accuracy_reward`."""

    def cosine_scaled_reward(
        completions: Sequence[Any], solution: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> Scores:
        scores: Scores = []
        for correct, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            short, long = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
            share = (1 + math.cos(min(len(ids) / max_len, 1.0) * math.pi)) / 2
            scores.append(None if correct is None else long + (short - long) * share)
        return scores

    return cosine_scaled_reward
