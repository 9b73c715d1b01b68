"""Hard links and hashes of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def link_file(file: Path, name: Path) -> None:
    """Hard-link `file` as `name`, or copy it if the file system does not support links. Replaces an existing `name`."""
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
