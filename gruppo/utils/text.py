"""JSON and text of arbitrary Python values."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_ENDS = re.compile(r"[\"'.,;:!?’”)\]]+(?=\s|$)|(?:(?<=\s)|^)[\"'‘“(\[]+")


def normalized(text: str) -> str:
    """The text without case, compatibility forms, extra whitespace and punctuation around words.

    Math signs stay, as they distinguish questions.
    """
    return " ".join(_ENDS.sub("", unicodedata.normalize("NFKC", text).casefold()).split())


def as_json(value: Any) -> str:
    """A value of a user's row as JSON. Sets become sorted lists; values that JSON cannot represent become their
    text."""
    try:
        return json.dumps(value, default=writable_text)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(as_text(value))


def writable_text(value: Any) -> Any:
    """A replacement for a value that JSON does not support: a sorted list of texts for a set, else its text."""
    return sorted(map(as_text, value)) if isinstance(value, set) else as_text(value)


def as_text(value: Any) -> str:
    """`str(value)`, or a placeholder for objects whose `str` fails."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001  __str__ of a user's object may raise anything
        return f"<{type(value).__name__} that cannot be printed>"


def text_of_part(part: Any) -> str | None:
    """The text of one part of a message's content: of text, or {"type": "text", "text": …}; None for other parts."""
    if isinstance(part, Mapping) and part.get("type") in (None, "text", "input_text", "output_text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def text_of_content(content: Any) -> str:
    """The text of a message's content: "" for None, the text parts of a list joined, else the value as text."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        return "".join(text for part in content if (text := text_of_part(part)) is not None)
    return str(content)
