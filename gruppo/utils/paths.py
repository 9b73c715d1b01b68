"""Paths given by users, which may contain "~" or be invalid for any file system."""

from __future__ import annotations

from pathlib import Path


def user_path(name: str | Path) -> Path:
    """The path with "~" expanded; unchanged if there is no such home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_file(path: Path) -> bool:
    """Whether the file exists. False for impossible names (too long, with null characters or lone surrogates)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """Whether the folder exists; see `is_file`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
