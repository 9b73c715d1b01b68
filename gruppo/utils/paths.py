"""The cache, and paths given by users, which may contain "~" or be invalid for any file system."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_dir() -> Path:
    """Folder of converted weights, compiled kernels and records of own folders: GRUPPO_CACHE, or ~/.cache/gruppo."""
    return Path(os.environ.get("GRUPPO_CACHE") or Path.home() / ".cache" / "gruppo")


def user_path(name: str | Path) -> Path:
    """The path with "~" expanded; unchanged if there is no such home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def from_here(path: Path) -> Path:
    """The path relative to the current folder, without "..", if it lies there; else unchanged."""
    here, whole = Path.cwd().resolve(), path.resolve()
    return whole.relative_to(here) if whole.is_relative_to(here) else path


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


def not_a_file(path: Path) -> str | None:
    """What stands at a path in place of a regular file ("a FIFO", "a folder", …); None if there is a file or nothing.

    Opening a FIFO waits until something writes to it, and a device may never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((words for is_kind, words in kinds.items() if is_kind(mode)), None)
