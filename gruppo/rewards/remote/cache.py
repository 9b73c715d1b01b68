"""Answers of servers, kept in the run folder by the hash of everything that was sent.

One SQLite file, which the reward processes of a run share. The first answer to a request is the one that counts, for
every process and for a resumed run. Damage is never an error: a damaged entry is asked for again, and a damaged file
is moved aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

# What SQLite says of a file that is damaged, is no database, or has other tables than this one.
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA}
_SECONDS = 10.0  # to wait for another process


def request_hash(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request as canonical JSON, in hexadecimal."""
    return hashlib.sha256(_as_json(request)).hexdigest()


class AnswerCache:
    """Answers by the hash of their request. Without a path, nothing is kept."""

    def __init__(self, path: Path | None, is_valid: Callable[[dict[str, Any]], bool]) -> None:
        """`path`: the file, created by the first answer. `is_valid`: whether an answer has the form that is expected;
        others count as damaged."""
        self._path, self._is_valid = path, is_valid
        self._database: sqlite3.Connection | None = None
        self._file = 0  # inode of the open file

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a request, or None if there is none, or only a damaged one."""
        if self._path is None or not self._path.is_file():
            return None
        return self._do(lambda database: self._read(database, key))

    def put(self, key: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer, unless one is kept already. Returns the one that is kept.

        If the file cannot be written (disk full, no locks), this is printed once, and nothing more is kept.
        """

        def write(database: sqlite3.Connection) -> dict[str, Any]:
            with database:
                database.execute("BEGIN IMMEDIATE")
                if (kept := self._read(database, key)) is not None:
                    return kept
                text = _as_json(answer).decode()
                row = key, text, hashlib.sha256(text.encode()).hexdigest()
                database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)
            return answer

        return self._do(write) or answer

    def _do(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        for _ in range(2):
            if self._path is None:
                return None
            try:
                return work(self._open(self._path))
            except sqlite3.DatabaseError as error:
                damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
                self._give_up(self._path, error, damaged)
            except OSError as error:
                self._give_up(self._path, error, damaged=False)
        return None

    def _read(self, database: sqlite3.Connection, key: str) -> dict[str, Any] | None:
        row = database.execute("SELECT answer, sha256 FROM answers WHERE key = ?", (key,)).fetchone()
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if row is not None and hashlib.sha256(row[0].encode()).hexdigest() == row[1]:
                answer = json.loads(row[0])
                return answer if isinstance(answer, dict) and self._is_valid(answer) else None
        return None

    def _open(self, path: Path) -> sqlite3.Connection:
        """The database. Another process may have moved a damaged file aside."""
        if path.is_symlink():
            raise OSError("it is a link")
        if self._database is not None and path.is_file() and path.stat().st_ino == self._file:
            return self._database
        self._close()
        database = self._database = sqlite3.connect(path, timeout=_SECONDS, isolation_level=None)
        database.execute("PRAGMA trusted_schema = OFF")
        create = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT, sha256 TEXT) WITHOUT ROWID"
        database.execute(create)
        self._file = path.stat().st_ino
        return database

    def _give_up(self, path: Path, error: Exception, damaged: bool) -> None:
        """Move a damaged file aside, or do without the cache."""
        opened = self._file
        self._close()
        if not damaged:
            print(f"{path.name} cannot be used ({error}); answers are not kept", flush=True)  # noqa: T201  to rewards.log
            self._path = None
            return
        with contextlib.suppress(OSError):
            if not opened or path.stat().st_ino == opened:
                path.replace(path.with_name(path.name + ".damaged"))
                path.with_name(path.name + "-journal").unlink(missing_ok=True)

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database, self._file = None, 0


def _as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
