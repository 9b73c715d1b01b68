"""Atomic writes: a file is complete or unchanged, even if the disk is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gruppo.errors import RunError
from gruppo.utils.waiting import waiting_for

_ASIDE = ".replaced-"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: it is complete afterwards, or unchanged if the write fails."""
    temporary = path.with_name(path.name + ".writing")
    with writing(path, temporary):
        temporary.write_bytes(content)
        publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Sync a finished file or folder and rename it to `path`, replacing what is there.

    A folder cannot replace a folder atomically. The old one is moved aside, and `recover` restores it after a kill in
    between.
    """
    for written in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
        _sync(written)
    aside = path.with_name(_ASIDE + path.name)
    if path.is_dir():
        path.rename(aside)
    temporary.replace(path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(parent: Path) -> None:
    """Undo what a kill left half done in a folder of folders: restore old folders, delete unfinished ones."""
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
    errno.EDQUOT: "the disk quota is exhausted",
    errno.EFBIG: "the file would be larger than is allowed (ulimit -f, or the file system)",
}


class WriteError(RunError):
    """A file of a run could not be written; its previous content is unchanged."""


@contextmanager
def writing(path: Path, *begun: Path) -> Iterator[None]:
    """Guard a block that writes `path` through the temporary files or folders `begun`; they are deleted if it fails.

    Raises WriteError in place of an error of the operating system, also if a library reports it as text only.
    """
    try:
        with waiting_for(f"the file system, to write {path}"):
            yield
    except Exception as error:
        for temporary in begun:
            remove(temporary)
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
    """The reason that the operating system gave; None if the error is not from the operating system."""
    match = re.search(r"\(os error (\d+)\)", str(error))  # from libraries written in Rust
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    if number is None:
        return None
    return f"{_FULL[number]} ({os.strerror(number)})" if number in _FULL else os.strerror(number)
