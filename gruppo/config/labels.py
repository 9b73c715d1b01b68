"""Labels of reward functions: `"label = function"` in reward.functions."""

from __future__ import annotations

import re

_LABELED = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s+=\s+(\S.*)")


def split_label(entry: str) -> tuple[str, str]:
    """Label and function of an entry of reward.functions: "short = regex" -> ("short", "regex"); without a label,
    ("", entry)."""
    match = _LABELED.fullmatch(entry)
    return (match[1], match[2].strip()) if match else ("", entry)


def options_name(entry: str) -> str:
    """The key of an entry's options in reward.options: its label, or else the entry itself."""
    return split_label(entry)[0] or entry
