"""Writing to a disk that may be full: nothing half written is left behind, and what failed is told in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gruppo.errors import RunError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "the file would be larger than is allowed (ulimit -f, or the file system)",
}


class WriteError(RunError):
    """A file of a run could not be written; what was there before is as it was."""


@contextmanager
def writing(path: Path, *begun: Path) -> Iterator[None]:
    """The block writes `path`, by way of the files or folders `begun`, which are gone again where it fails. Raises
    WriteError in place of what the system, or a library that knows its errors by their text alone, raises."""
    try:
        yield
    except Exception as error:
        for each in begun:
            remove(each)
        why = _why(error)
        if why is None or isinstance(error, WriteError):
            raise
        raise WriteError(f"{path}: cannot be written: {why}") from error


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _why(error: Exception) -> str | None:
    """What the system said, in words; None where the error is not the system's."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # of libraries written in Rust
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number is None:
        return None
    return f"{_FULL[number]} ({os.strerror(number)})" if number in _FULL else os.strerror(number)


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
