"""The values of rows: which are missing, which are bytes, and limits on text, nesting and memory."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.nesting import MAX_DEPTH

_SIZED = (str, int, float, bool, bytes, list, tuple, dict)
_OBJECT = 64  # bytes counted for a value of any other type


def is_missing(value: Any) -> bool:
    """Whether there is no value: None, NaN, or the NA or NaT of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float | Decimal) and value != value  # noqa: PLR0124  NaN


def has_bytes(value: Any) -> bool:
    """Whether a value is bytes, or an object or list that contains some."""
    if isinstance(value, Mapping):
        return any(map(has_bytes, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_bytes, value))
    return isinstance(value, bytes | bytearray | memoryview)


def row_bytes(row: Row, where: str, limit: int, replaceable: Collection[str] = ()) -> int:
    """Memory of a row in bytes, counted until it exceeds `limit`.

    Raises UsageError, naming row and column, for values nested more than MAX_DEPTH levels deep, and for text with a
    lone surrogate, which has no UTF-8 form; except in the columns `replaceable`, where the reader replaces it.
    """
    total = sys.getsizeof(row)
    values = [(column, value, 1) for column, value in row.items()]
    for column in row:
        _require_encodable(column, column, where)
    while values:
        column, value, depth = values.pop()
        total += sys.getsizeof(value) if type(value) in _SIZED else _OBJECT
        if total > limit:
            return total
        if isinstance(value, str) and column not in replaceable:
            _require_encodable(value, column, where)
        elif isinstance(value, Mapping | list | tuple):
            if depth >= MAX_DEPTH:
                raise UsageError(
                    f"{where}: the column {column} is nested more than {MAX_DEPTH} levels deep; write it as text, or "
                    "leave it out"
                )
            items = [*map(str, value), *value.values()] if isinstance(value, Mapping) else value
            values += [(column, item, depth + 1) for item in items]
    return total


def _require_encodable(text: str, column: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 20) : error.start + 20]
        raise UsageError(
            f"{where}: the column {column} contains {text[error.start]!r}, half of a surrogate pair, in {shown!r}; "
            "write the whole character, or remove it"
        ) from None


def require_memory(needed: int, limit: int, field: str = "memory") -> None:
    """Raise UsageError if rows need more memory than the limit, both in bytes. `field`: name of the limit in errors."""
    if needed > limit:
        raise UsageError(
            f'{field} = "{limit / 1e9:g} GB": the rows, unpacked, need more than that; raise it, or use fewer rows or '
            "columns"
        )
