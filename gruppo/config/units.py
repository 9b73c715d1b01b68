"""Memory sizes as written in recipes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

_UNITS = {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    if prefix or unit == "B"
}


def as_bytes(text: str) -> int:
    """A size such as "6 GB" (GB = 10⁹ bytes) or "5.5 GiB" (GiB = 2³⁰ bytes), in bytes.

    Raises PydanticCustomError if the text is not a size of at least one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise PydanticCustomError("memory", "must be a number followed by B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return size


def bytes_of(memory: float | str, whole: int) -> int:
    """A memory that `share_or_size` accepts, in bytes: a size, or a fraction of `whole` bytes."""
    return as_bytes(memory) if isinstance(memory, str) else int(memory * whole)


def _checked_size(text: str) -> str:
    as_bytes(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]  # a size that `as_bytes` accepts


def share_or_size(value: Any) -> Any:
    """The value unchanged, if it is a fraction of memory or a size that `as_bytes` accepts.

    Raises PydanticCustomError otherwise.
    """
    if isinstance(value, str):
        as_bytes(value)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PydanticCustomError("memory", "must be a fraction (more than 0, at most 1) or a size such as '6 GB'")
    return value
