"""Writing files so that they are there whole or not at all, also when the disk is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gruppo.errors import RunError

_ASIDE = ".replaced-"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before."""
    temporary = path.with_name(path.name + ".writing")
    with writing(path, temporary):
        temporary.write_bytes(content)
        publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Sync a finished file or folder and give it its name, replacing what had it.

    A folder cannot replace a folder in one stroke: the old one is set aside, and `recover` brings it back where a kill
    came in between.
    """
    for each in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
        _sync(each)
    aside = path.with_name(_ASIDE + path.name)
    if path.is_dir():
        path.rename(aside)
    temporary.replace(path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(parent: Path) -> None:
    """Undo what a kill left half done in a folder of folders: bring back what was set aside, drop what was begun."""
    for aside in parent.glob(_ASIDE + "*"):
        path = parent / aside.name.removeprefix(_ASIDE)
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    for begun in parent.glob(".writing-*"):
        shutil.rmtree(begun)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
