"""Built-in rewards: functions in TRL's signature that compare completions with the column `answer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gruppo.tasks.answers import same_number, same_text


def number(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the last number of a completion equals the last number of its answer, else 0."""
    return [float(same_number(text_of(each), right)) for each, right in zip(completions, answer, strict=True)]


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where a completion equals its answer, white space at the ends apart, else 0."""
    return [float(same_text(text_of(each), right)) for each, right in zip(completions, answer, strict=True)]


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion that is text, or messages whose last one counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
