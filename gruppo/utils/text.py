"""Values as JSON, and texts that any file can hold."""

from __future__ import annotations

import json
from typing import Any


def as_json(value: Any) -> str:
    """A value of a user's row as JSON; sets as sorted lists, what JSON cannot say as its text."""
    try:
        return json.dumps(value, default=writable_text)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(as_text(value))


def writable_text(value: Any) -> Any:
    """What JSON can hold of a value that it does not know."""
    return sorted(map(as_text, value)) if isinstance(value, set) else as_text(value)


def as_text(value: Any) -> str:
    """`str(value)`, also of objects that cannot be printed."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001  a user's object can refuse to be printed
        return f"<{type(value).__name__} that cannot be printed>"
