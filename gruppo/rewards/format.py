"""Rewards for the format of a completion, regardless of its content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import text_of
from gruppo.utils.text import text_of_content

_OPENED = re.compile(r"<think>\s*\Z")


def think_format(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    prompt_endings: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """1 if an answer begins with <think> and has exactly one <think> and one </think>, else 0.

    The answer is the completion, preceded by what the prompt has already written of it: a <think> at the end of the
    prompt (of its text, or as the chat template renders it), or an assistant message that the completion continues, if
    it has an open <think>. Equals TRL's think_format_reward, except that TRL reads only the completion and also gives
    1 for more than one </think>.
    """
    begun = [
        _begun(prompt, ending)
        for prompt, ending in zip(
            prompts or [""] * len(completions), prompt_endings or [""] * len(completions), strict=True
        )
    ]
    texts = [before + text_of(completion) for before, completion in zip(begun, completions, strict=True)]
    return [
        float(text.startswith("<think>") and text.count("<think>") == 1 == text.count("</think>")) for text in texts
    ]


def _begun(prompt: Any, ending: str) -> str:
    """The beginning of the answer that a prompt contains, from its open <think>; "" if it has none."""
    if not isinstance(prompt, str):
        message = prompt[-1] if prompt else {}
        continued = text_of_content(message.get("content")) if message.get("role") == "assistant" else ""
        if "<think>" in continued and "</think>" not in continued.rpartition("<think>")[2]:
            return continued.lstrip()
    elif _OPENED.search(prompt):
        return "<think>"
    return "<think>" if _OPENED.search(ending) else ""


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
