"""Free and used bytes of a disk."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int:
    """Bytes that may be written to the file system of a path, or of the first folder above it that is there."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def held_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, each once however many names it has."""
    found = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({each.st_ino: each.st_size for each in found}.values())


def gigabytes(size: float) -> str:
    """A size in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
