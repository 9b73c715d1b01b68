"""Labels of reward functions: `"label = function"` in reward.functions."""

from __future__ import annotations

import re

from gruppo.utils.paths import is_file, user_path

_LABELED = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s+=\s+(\S.*)")


def split_label(entry: str) -> tuple[str, str]:
    """Label and function of an entry of reward.functions: "short = regex" -> ("short", "regex"); without a label,
    ("", entry)."""
    match = _LABELED.fullmatch(entry)
    return (match[1], match[2].strip()) if match else ("", entry)


# An "=" that is neither that of a label nor part of a path.
_MEANT = re.compile(r"\s*([^:/\\=]*?)\s*=\s*(\S.*?)\s*")


def label_mistake(entry: str) -> str | None:
    """What is wrong with the label of an entry such as "a=regex", and the fix; None if nothing is."""
    match = None if split_label(entry)[0] else _MEANT.fullmatch(entry)
    if match is None or is_file(user_path(entry.rpartition(":")[0])):  # a file whose name contains "="
        return None
    label = re.sub(r"\W+", "_", match[1], flags=re.ASCII).strip("_") or "label"
    label = f"_{label}" if label[0].isdigit() else label
    return (
        f'"{entry}": a label is made of letters, digits and _, with a space on either side of "="; write '
        f'"{label} = {match[2]}"'
    )


def options_name(entry: str) -> str:
    """The key of an entry's options in reward.options: its label, or else the entry itself."""
    return split_label(entry)[0] or entry
