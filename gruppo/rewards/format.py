"""Rewards for the form of a completion, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import text_of


def think_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where a completion begins with <think> and has exactly one <think> and one </think>, else 0.

    TRL's think_format_reward, but for one thing: there, more than one </think> gives 1.
    """
    texts = [text_of(completion) for completion in completions]
    return [
        float(text.startswith("<think>") and text.count("<think>") == 1 == text.count("</think>")) for text in texts
    ]


class Regex:
    """1 where the whole of a completion, white space at its ends apart, matches the pattern, else 0.

    The pattern is of Python's `re`; a dot also matches line breaks. Other flags stand in it: "(?i)yes|no".
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise UsageError(
                f"pattern = {pattern!r}: not a regular expression ({error}); write one for Python's re"
            ) from None

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(self.pattern.fullmatch(text_of(completion).strip()) is not None) for completion in completions]
