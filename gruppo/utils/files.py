"""Hashes and links of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def link_file(file: Path, name: Path) -> None:
    """Give a file another name, or a copy where the file system has no links."""
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
