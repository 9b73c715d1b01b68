"""Sizes of memory, as recipes write them."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import PydanticCustomError

_UNITS = {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    if prefix or unit == "B"
}


def as_bytes(text: str) -> int:
    """A size such as "6 GB" (10⁹ bytes) or "5.5 GiB" (2³⁰) in bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    size = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise PydanticCustomError("memory", "must be a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return size


def share_or_size(value: Any) -> Any:
    """The value, where it is a share of a memory or a size that `as_bytes` reads."""
    if isinstance(value, str):
        as_bytes(value)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PydanticCustomError("memory", "must be a share (more than 0, at most 1) or a size such as '6 GB'")
    return value
