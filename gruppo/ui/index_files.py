"""Which tables of a run folder are new, have changed or are gone since they were last looked at.

Looking is cheap for the folder of a long run: while its time of modification stays, nothing is listed. Otherwise the
names are listed, and files are asked for size and time only if they are unknown, if their inode is another, or from the
newest backwards up to the first unchanged one: a resume deletes all tables after its checkpoint and writes them anew in
order, perhaps with the same inodes. Every file is asked on the first look, and whenever one is gone.

While a run adds tables one after the other, not even the names are listed, for at most `QUICK_LOOKS` looks in a row:
the newest table is as it was, so only those that follow it can be new.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gruppo.runs.reading import step_of_name

MOST_STEP = 2**40
QUICK_LOOKS = 16
_SETTLED = 2 * 10**9  # nanoseconds; a folder that changed less than this ago may change again without a newer time


class Signature(NamedTuple):
    """What identifies the content of a file. A size of -1 stands for an entry that is not a regular file."""

    size: int
    modified: int
    inode: int


class Changes(NamedTuple):
    """Tables to read, by step, and the steps whose tables are gone."""

    read: dict[int, Signature]
    gone: list[int]


class TableFolder:
    """The tables in one folder of a run, e.g. rollouts/."""

    def __init__(self, run: Path, name: str) -> None:
        self.run, self.path = run, run / name
        self._seen: int | None = None  # time of modification of the folder as it was last looked at
        self._listed: int | None = None
        self._looked = False
        self._steps: dict[str, int] = {}  # by the name of a table
        self._quick = 0  # looks without a list of the names

    def forget(self) -> None:
        """Look at every file again."""
        self._seen, self._looked = None, False

    def changes(self, known: Mapping[int, Signature]) -> Changes:
        """What to read and what is gone, given what is known. The caller says with `looked` that it has followed."""
        try:
            modified = self.path.stat().st_mtime_ns
            if modified == self._seen:
                return Changes({}, [])
            if not self.path.resolve().is_relative_to(self.run.resolve()):
                return Changes({}, sorted(known))
            self._listed = modified if time.time_ns() - modified > _SETTLED else None
            following = self._following(known)
            self._quick = self._quick + 1 if following else 0
            if following:
                self._listed = None
                return Changes(following, [])
            return self._compare(known)
        except (OSError, RuntimeError):  # no such folder, or a link to itself
            self._listed = None
            return Changes({}, sorted(known))

    def looked(self) -> None:
        """The last changes have been followed."""
        self._seen, self._looked = self._listed, True

    def _following(self, known: Mapping[int, Signature]) -> dict[int, Signature]:
        """The new tables after the newest one; empty if all names have to be listed."""
        step = max(known, default=-1)
        found: dict[int, Signature] = {}
        if self._looked and self._quick < QUICK_LOOKS and step >= 0 and self._signature_of(step) == known[step]:
            while (signature := self._signature_of(step + 1)) is not None:
                step += 1
                found[step] = signature
        return found

    def _compare(self, known: Mapping[int, Signature]) -> Changes:
        found: set[int] = set()
        asked: dict[int, os.DirEntry[str]] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                step = self._steps.get(entry.name)
                if step is None:
                    step = _step(entry.name)
                    if step is None:
                        continue
                    self._steps[entry.name] = step
                if not self._looked or step not in known or entry.inode() != known[step].inode:
                    asked[step] = entry
                found.add(step)
        gone = sorted(known.keys() - found)
        if gone and self._looked:
            self._looked = False
            return self._compare(known)
        read = {}
        for step, entry in sorted(asked.items()):
            signature = _signature(entry)
            if signature is not None and signature != known.get(step):
                read[step] = signature
        for step in sorted(found & known.keys() - asked.keys(), reverse=True):
            signature = self._signature_of(step)
            if signature == known[step]:
                break
            if signature is not None:
                read[step] = signature
        return Changes(dict(sorted(read.items())), gone)

    def _signature_of(self, step: int) -> Signature | None:
        try:
            return _as_signature((self.path / name_of(step)).lstat())
        except OSError:
            return None


def name_of(step: int) -> str:
    """The file name of a step's table."""
    return f"step-{step:06d}.parquet"


def _step(name: str) -> int | None:
    """The step of a table's file name; None for any other name, also for other spellings of a step."""
    step = step_of_name(name) if name.endswith(".parquet") else None
    return step if step is not None and step < MOST_STEP and name == name_of(step) else None


def _signature(entry: os.DirEntry[str]) -> Signature | None:
    try:
        return _as_signature(entry.stat(follow_symlinks=False))
    except OSError:  # deleted meanwhile
        return None


def _as_signature(status: os.stat_result) -> Signature:
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Signature(size, status.st_mtime_ns, status.st_ino)
