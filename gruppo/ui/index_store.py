"""The DuckDB file of an index: in the cache if this process may have it, otherwise in a temporary folder of its own.

A cache file belongs to one process at a time, by a lock on a file beside it. A file of another version, or one that
cannot be opened, is deleted and begun again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import duckdb

VERSION = 1  # of the tables below and of what `gruppo.ui.index_rows` puts into them
MEMORY = "128MB"
LOG = 8 * 2**20  # bytes of the log of changes, beyond which they are moved into the file
_SCHEMA = """
CREATE TABLE about (version INTEGER, run VARCHAR, recipe VARCHAR);
CREATE TABLE files (
    kind VARCHAR, step BIGINT, size BIGINT, modified BIGINT, inode UBIGINT, problem VARCHAR
);
CREATE TABLE steps (
    step BIGINT, groups INTEGER, completions INTEGER, mean DOUBLE, nonzero DOUBLE, length DOUBLE, truncated INTEGER,
    excluded INTEGER, "right" INTEGER
);
CREATE TABLE groups (
    step BIGINT, "group" INTEGER, draw BIGINT, prompt_id VARCHAR, prompt VARCHAR, rewards DOUBLE[], mean DOUBLE,
    std DOUBLE, best DOUBLE, shortest INTEGER, longest INTEGER, completions INTEGER, truncated INTEGER,
    excluded INTEGER, trained INTEGER, "right" INTEGER, skipped VARCHAR, nonzero BOOLEAN
);
CREATE TABLE completions (
    step BIGINT, "group" INTEGER, completion INTEGER, reward DOUBLE, parts VARCHAR, length INTEGER,
    finish_reason VARCHAR, failure VARCHAR, trained BOOLEAN, skipped VARCHAR, advantage DOUBLE, "right" BOOLEAN
);
CREATE TABLE answers (
    step BIGINT, position INTEGER, eval_set VARCHAR, prompt_id VARCHAR, sample BIGINT, correct BOOLEAN,
    extracted VARCHAR, rule VARCHAR, vote VARCHAR, score DOUBLE, finish_reason VARCHAR, length INTEGER,
    question VARCHAR
);
"""
TABLES = ("files", "steps", "groups", "completions", "answers")


class Store:
    """An open DuckDB file. `private`: it is not in the cache and goes when it is closed."""

    def __init__(self, path: Path | None, lock: int | None = None, folder: Path | None = None) -> None:
        self.path, self._lock, self._folder = path, lock, folder
        self.private = lock is None
        self.connection = _connect(path)

    def checkpoint(self) -> None:
        """Move what was added into the file, if it is much; until then it is in memory, and twice on the disk."""
        log = None if self.path is None else self.path.with_name(self.path.name + ".wal")
        if log is not None and log.exists() and log.stat().st_size > LOG:
            with suppress(duckdb.TransactionException):  # a page is being answered; the next call does it
                self.connection.execute("CHECKPOINT")

    def close(self) -> None:
        """Close the file and release it; delete it if it is private."""
        self.connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def discard(self) -> None:
        """Close the file and delete it."""
        self.connection.close()
        if self.path is not None:
            _delete(self.path)
        self.close()


def open_store(cache: Path, run: Path) -> Store:
    """The store of a run in the cache, as it was left; private and empty if the cache cannot be used."""
    try:
        return _cached(cache, run)
    except (OSError, duckdb.Error):
        return private_store(run)


def private_store(run: Path) -> Store:
    """An empty store in a temporary folder; in memory if there is none."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="gruppo-ui-"))
        store = Store(folder / "index.duckdb", folder=folder)
        _begin(store, run)
    except (OSError, duckdb.Error):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        store = Store(None)
        _begin(store, run)
    return store


def _cached(cache: Path, run: Path) -> Store:
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(run)).hexdigest()[:32]
    lock = os.open(cache / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    path = cache / f"{name}.duckdb"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            with suppress(duckdb.Error):  # damaged, or of another version of DuckDB
                store = Store(path, lock)
                if _fits(store, run):
                    return store
            _delete(path)
        store = Store(path, lock)
        _begin(store, run)
        return store
    except BaseException:
        os.close(lock)
        raise


def _connect(path: Path | None) -> duckdb.DuckDBPyConnection:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY,
        "threads": 2,
        "enable_external_access": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,
        "lock_configuration": True,
    }
    if path is not None:
        settings |= {"temp_directory": str(path.with_suffix(".tmp")), "max_temp_directory_size": "1GB"}
    return duckdb.connect(":memory:" if path is None else str(path), config=settings)


def _fits(store: Store, run: Path) -> bool:
    """Whether the file is an index of this version of this run; it is closed if not."""
    try:
        found = store.connection.execute("SELECT version, run FROM about").fetchall()
    except duckdb.Error:
        found = []
    if found != [(VERSION, _named(run))]:
        store.connection.close()
    return found == [(VERSION, _named(run))]


def _begin(store: Store, run: Path) -> None:
    store.connection.execute(_SCHEMA)
    store.connection.execute("INSERT INTO about VALUES (?, ?, '')", [VERSION, _named(run)])


def _named(run: Path) -> str:
    return os.fsencode(run).decode("utf-8", "backslashreplace")


def _delete(path: Path) -> None:
    for file in (path, path.with_name(path.name + ".wal")):
        file.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
