"""An index over the tables of a run folder, which answers questions about a million completions in milliseconds.

It is a DuckDB file in a cache, never in the run folder. `Index.update` brings it up to date: new tables are added, and
those that a resume has deleted or written anew are replaced, each with all of its rows at once. A table that cannot be
read is remembered with its message, and the rest goes on. Questions can be asked meanwhile, from any thread.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import tomllib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from gruppo.config.method_section import Method
from gruppo.config.renames import translate_recipe
from gruppo.errors import RunError, UsageError, first_line
from gruppo.runs.reading import reading
from gruppo.ui.index_files import MOST_STEP, Signature, TableFolder, name_of
from gruppo.ui.index_rows import evaluation_rows, rollout_rows
from gruppo.ui.index_store import TABLES, Store, open_store, private_store
from gruppo.ui.queries import Ask, Queries

KINDS = ("rollouts", "evaluations")
_OF = {"rollouts": ("steps", "groups", "completions"), "evaluations": ("answers",)}  # tables of the index
_ROWS = 20_000  # of tables that are added in one transaction, about
_RECIPE = 2**20  # bytes
_DAMAGE = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)

Progress = Callable[[int, int], None]


class Index(Queries):
    """The index of one run. `cache`: the folder of the index, which is made if it is missing.

    If the cache cannot be used (it is read-only or full, or another process has this index open), the index is in a
    temporary folder instead, and is built anew.
    """

    def __init__(self, run: Path, cache: Path) -> None:
        self.run, self.cache = run.resolve(), cache
        self._updating, self._using = threading.Lock(), threading.Lock()
        self._folders = {kind: TableFolder(self.run, kind) for kind in KINDS}
        self._closed = self._lost = False
        store = open_store(cache, self.run)
        try:
            self._open(store)
        except duckdb.Error:  # damaged, which only reading it shows
            self._finalizer.detach()
            store.discard()
            self._open(open_store(cache, self.run))

    @property
    def private(self) -> bool:
        """Whether the index is temporary."""
        return self._store.private

    def close(self) -> None:
        """Stop an update that is going on, and release the index."""
        self._closed = True
        with self._updating, self._using:
            self._finalizer.detach()
            self._store.close()

    def update(self, progress: Progress | None = None) -> int:
        """Bring the index up to date; returns the number of tables that were added, replaced or removed.

        `progress(done, total)`: called with numbers of tables, before the first one and after each transaction. Raises
        RunError if there is no space for the index anywhere.
        """
        with self._updating:
            if self._closed:
                return 0
            if not self._lost:
                with suppress(duckdb.Error):
                    return self._update(progress)
            self._begin_again()
            try:
                return self._update(progress)
            except duckdb.Error as error:
                raise RunError(
                    f"the index of {self.run} cannot be written ({first_line(error)}); free some space in "
                    f"{self.cache} or in {tempfile.gettempdir()}"
                ) from error

    def _open(self, store: Store) -> None:
        with self._using:
            self._store = store
            self._finalizer = weakref.finalize(self, store.close)
        self._known: dict[str, dict[int, Signature]] = {kind: {} for kind in KINDS}
        for kind, step, *signature in store.connection.execute(
            "SELECT kind, step, size, modified, inode FROM files"
        ).fetchall():
            self._known[kind][step] = Signature(*signature)
        (self._recipe,) = store.connection.execute("SELECT recipe FROM about").fetchone() or ("",)
        for folder in self._folders.values():
            folder.forget()

    def _begin_again(self) -> None:
        """Delete a store that cannot be read or written, and begin a private one."""
        before, self._lost = self._store, False
        self._finalizer.detach()
        self._open(private_store(self.run))
        with suppress(duckdb.Error, OSError):
            before.discard()

    def _update(self, progress: Progress | None) -> int:
        recipe = _read_recipe(self.run)
        if (digest := hashlib.sha256(recipe).hexdigest()) != self._recipe:
            self._reset(digest)
        threshold = success_threshold(recipe)
        changes = {kind: folder.changes(self._known[kind]) for kind, folder in self._folders.items()}
        removed = self._remove({kind: [*found.gone, *(found.read.keys() & self._known[kind])]
                                for kind, found in changes.items()})  # fmt: skip
        pending = [(kind, step, signature) for kind, found in changes.items() for step, signature in found.read.items()]
        if progress is not None and pending:
            progress(0, len(pending))
        for done in self._add(pending, threshold):
            if progress is not None:
                progress(done, len(pending))
        if not self._closed:
            for folder in self._folders.values():
                folder.looked()
        return len(pending) + removed

    def _reset(self, recipe: str) -> None:
        """Forget everything: the folder holds another run, or what counts as right has changed."""
        with self._transaction() as cursor:
            for table in TABLES:
                cursor.execute(f"DELETE FROM {table}")
            cursor.execute("UPDATE about SET recipe = ?", [recipe])
        self._recipe = recipe
        self._known = {kind: {} for kind in KINDS}
        for folder in self._folders.values():
            folder.forget()

    def _remove(self, steps: Mapping[str, Sequence[int]]) -> int:
        """Remove the rows of tables. Those that will be read again are included: two attempts are never mixed."""
        if not any(steps.values()):
            return 0
        with self._transaction() as cursor:
            for kind, removed in steps.items():
                if removed:
                    for table in _OF[kind]:
                        cursor.execute(f"DELETE FROM {table} WHERE step IN (SELECT unnest(?))", [removed])
                    cursor.execute("DELETE FROM files WHERE kind = ? AND step IN (SELECT unnest(?))", [kind, removed])
        for kind, removed in steps.items():
            for step in removed:
                del self._known[kind][step]
        return sum(map(len, steps.values()))

    def _add(self, pending: Sequence[tuple[str, int, Signature]], threshold: float) -> Iterator[int]:
        """Add tables; yields how many are done after each transaction."""
        rows: dict[str, list[pa.Table]] = {}
        files: list[tuple[Any, ...]] = []
        size = 0
        for done, (kind, step, signature) in enumerate(pending, start=1):
            if self._closed:
                return
            problem, found = self._read(kind, step, signature, threshold)
            if problem is not None or found:
                files.append((kind, step, *signature, problem))
            for table, part in found.items():
                rows.setdefault(table, []).append(part)
                size += len(part)
            if size >= _ROWS or len(files) >= 500 or done == len(pending):
                self._commit(rows, files)
                self._store.checkpoint()
                rows, files, size = {}, [], 0
                yield done

    def _read(self, kind: str, step: int, signature: Signature, threshold: float) -> tuple[str | None, Any]:
        """What is wrong with a table, and its rows. Neither, if it has gone meanwhile."""
        path = self.run / kind / name_of(step)
        if signature.size < 0:
            return f"{path}: is not a regular file; replace it with one", {}
        try:
            with reading(path, "restore it from a copy"):
                rows = rollout_rows(path, step, threshold) if kind == "rollouts" else evaluation_rows(path, step)
            return None, rows
        except UsageError as error:
            return (str(error), {}) if path.exists() else (None, {})

    def _commit(self, rows: Mapping[str, Sequence[pa.Table]], files: Sequence[tuple[Any, ...]]) -> None:
        with self._transaction() as cursor:
            for table, parts in rows.items():
                cursor.register("added", pa.concat_tables(parts))
                cursor.execute(f"INSERT INTO {table} BY NAME SELECT * FROM added")
                cursor.unregister("added")
            if files:
                names = ("kind", "step", "size", "modified", "inode", "problem")
                columns = dict(zip(names, zip(*files, strict=True), strict=True))
                columns["inode"] = pa.array(columns["inode"], pa.uint64())
                columns["problem"] = pa.array(columns["problem"], pa.string())
                cursor.register("added", pa.table(columns))
                cursor.execute("INSERT INTO files BY NAME SELECT * FROM added")
                cursor.unregister("added")
        for kind, step, size, modified, inode, _ in files:
            self._known[kind][step] = Signature(size, modified, inode)

    @contextmanager
    def _transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        cursor = self._store.connection.cursor()
        try:
            cursor.execute("BEGIN TRANSACTION")
            yield cursor
            cursor.execute("COMMIT")
        except BaseException:
            with suppress(duckdb.Error):
                cursor.execute("ROLLBACK")
            raise
        finally:
            cursor.close()

    @contextmanager
    def _asking(self) -> Iterator[Ask]:
        """Ask several questions about one state of the index."""
        with self._using:
            if self._closed:
                raise UsageError(f"{self.run}: its index is closed; open it again")
            cursor = self._store.connection.cursor()

        def ask(query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
            cursor.execute(query, values)
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

        try:
            cursor.execute("BEGIN TRANSACTION")
            yield ask
        except duckdb.Error as error:
            self._lost |= isinstance(error, _DAMAGE) or type(error) is duckdb.Error  # a wrong checksum
            raise UsageError(f"{self.run}: its index gives no answer ({first_line(error)}); try again") from error
        finally:
            with suppress(duckdb.Error):
                cursor.close()


def _read_recipe(run: Path) -> bytes:
    try:
        with (run / "recipe.toml").open("rb") as stream:
            return stream.read(_RECIPE)
    except OSError:
        return b""


def success_threshold(recipe: bytes) -> float:
    """method.success_threshold of a recipe in TOML; its default if the recipe cannot be read."""
    default = float(Method.model_fields["success_threshold"].default)
    try:
        value = translate_recipe(tomllib.loads(recipe.decode()))["method"]["success_threshold"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return default
    return float(value) if type(value) in (int, float) and abs(value) < MOST_STEP else default
