"""Rewards for the format of a completion, regardless of its content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import text_of


def think_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 if a completion begins with <think> and has exactly one <think> and one </think>, else 0.

    Equals TRL's think_format_reward, except that TRL also gives 1 for more than one </think>.
    """
    texts = [text_of(completion) for completion in completions]
    return [
        float(text.startswith("<think>") and text.count("<think>") == 1 == text.count("</think>")) for text in texts
    ]


class Regex:
    """1 if the whole completion, without leading and trailing white space, matches `pattern`, else 0.

    `pattern`: a regular expression for Python's `re`; the dot also matches line breaks. Write other flags inline:
    "(?i)yes|no". Raises UsageError if it is not a valid pattern.
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
