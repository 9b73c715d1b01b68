"""How deeply values are nested. Deeper values than the limit are refused before anything recursive reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 64


def too_deep(value: Any) -> bool:
    """Whether tables and lists are nested more than MAX_DEPTH levels deep, or contain themselves."""
    values = [(value, 1)]
    while values:
        item, depth = values.pop()
        if isinstance(item, Mapping | list | tuple):
            if depth > MAX_DEPTH:
                return True
            inner = item.values() if isinstance(item, Mapping) else item
            values += [(entry, depth + 1) for entry in inner]
    return False
