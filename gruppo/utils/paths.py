"""Paths as users write them: with "~", and with whatever else no file system can hold."""

from __future__ import annotations

from pathlib import Path


def user_path(name: str | Path) -> Path:
    """The path, "~" being the home of the user; as it stands where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that cannot be one's (too long, a null, a lone surrogate) is none's."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """Whether there is such a folder; see `is_file`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
