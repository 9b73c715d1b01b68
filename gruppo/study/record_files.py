"""The files of a record: what a study keeps of a run or an evaluation when its folder is gone.

record.json            facts, and the SHA-256 of the content of every other file; written last
recipe.toml …          as in the folder that is recorded
metrics.jsonl.gz …     JSON Lines, compressed without dates and names, so equal contents give equal files
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo import __version__
from gruppo.errors import UsageError
from gruppo.runs.atomic import write_whole
from gruppo.runs.reading import MOST_JSON, read_content, read_object, reading

MANIFEST = "record.json"


@dataclass(frozen=True)
class Record:
    """What is in a record: its facts, and the contents of its files by name, as they were before compression."""

    folder: Path
    facts: Mapping[str, Any]
    files: Mapping[str, bytes]


def write_record(folder: Path, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a record, or write it again.

    The manifest comes last: after a kill in between, the record is missing, or damaged in the sense of `read_record`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = _stored(folder, name)
        write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    hashes = {name: _sha256(content) for name, content in files.items()}
    write_facts(folder / MANIFEST, {"gruppo": __version__, **facts, "sha256": hashes})


def read_record(folder: Path, again: str) -> Record | None:
    """The record in a folder; None if there is none.

    Raises UsageError if it is damaged. `again`: what repeats the work, if no copy is left: "train", for example.
    """
    if not (folder / MANIFEST).is_file():
        return None
    fix = f"restore it from a copy, or delete {folder} to {again} again"
    with reading(folder / MANIFEST, fix):
        facts = json.loads(read_content(folder / MANIFEST, MOST_JSON))
        hashes = dict(facts["sha256"])
        if odd := [name for name in hashes if Path(name).name != name]:
            raise ValueError(f"{odd[0]!r} is no name of a file")
    files = {}
    for name, wanted in hashes.items():
        path = _stored(folder, name)
        with reading(path, fix):
            files[name] = read_content(path)
            if _sha256(files[name]) != wanted:
                raise ValueError(f"its content is not the one that {MANIFEST} names")
    return Record(folder, facts, files)


def read_facts(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside the records; empty if there is no file. Raises UsageError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except UsageError:
        raise UsageError(f"{path}: is damaged; restore it from a copy, or delete it") from None


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write such a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(facts, indent=1) + "\n").encode())


def files_in(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The contents of the files of a folder that exist, by name."""
    return {name: read_content(folder / name) for name in names if (folder / name).is_file()}


def _stored(folder: Path, name: str) -> Path:
    return folder / (f"{name}.gz" if name.endswith(".jsonl") else name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
