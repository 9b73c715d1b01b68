"""Free and used disk space."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int:
    """Bytes available on the file system of the path. If the path does not exist, that of its nearest existing
    parent."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def held_bytes(folder: Path) -> int:
    """Total bytes of all files in a folder. A file with several hard links counts once."""
    files = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({file.st_ino: file.st_size for file in files}.values())


def gigabytes(size: float) -> str:
    """A size in bytes as text, in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
