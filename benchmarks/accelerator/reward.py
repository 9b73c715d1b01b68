"""A reward that differs within every group, so that every completion is trained on."""

from __future__ import annotations

import hashlib
from typing import Any


def varied(completions: list[Any], **_: Any) -> list[float]:
    """A number between 0 and 1 from the hash of each completion."""
    return [
        hashlib.sha256(f"{place} {completion}".encode()).digest()[0] / 255
        for place, completion in enumerate(completions)
    ]
