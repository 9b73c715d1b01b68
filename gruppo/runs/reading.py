"""Safe reads of run folders, which may come from an untrusted source.

Everything in a run folder is read here, or after `require_own` has checked it: no link leads out of the folder, nothing
in it is a device, and no file exceeds its size limit once it is read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.config.renames import COLUMNS, renamed_parts, translate_event, translate_metrics
from gruppo.errors import RunError, UsageError
from gruppo.runs.tables import ADDED, AHEAD

MOST_JSON, MOST_LINES, MOST_TABLE = 64 * 2**20, 2**30, 8 * 2**30  # bytes; for a table, in memory
_ROWS, _FEW = 256, 16  # that are read at a time
_STEP = re.compile(r"step-(\d{6,18})(\.parquet)?", re.ASCII)
_OPTIONAL = AHEAD.union(*ADDED.values())


def require_own(folder: Path, links_to: Path | None = None) -> None:
    """Raise UsageError if the folder contains a link that leads out of it, or anything but files and folders.

    Reading such an entry, or continuing the run, would access something outside the folder. Links into `links_to` are
    allowed.
    """
    roots = [root.resolve() for root in (folder, links_to) if root is not None]
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            try:
                mode = path.lstat().st_mode
                inside = not stat.S_ISLNK(mode) or (any(map(path.resolve().is_relative_to, roots)) and path.exists())
            except FileNotFoundError:
                continue  # a run in the folder has just deleted it
            except (OSError, RuntimeError):  # a link to itself
                inside = False
            if not inside:
                raise UsageError(f"{path}: is a link that leads out of the folder; replace it with its target")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise UsageError(f"{path}: is neither a file nor a folder; remove it")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError if it contains something else, and FileNotFoundError."""
    content = _json(read_content(path, MOST_JSON), str(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is damaged (not an object); restore it from a copy, or use another folder")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; an empty list if there is no file.

    Blank lines and a last line that is still being written are skipped. Raises UsageError for a line that is not an
    object.
    """
    return lines_in(read_content(path, MOST_LINES), path) if path.is_file() else []


def lines_in(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The same for what is in such a file. `path`: where it is, for messages and for the recipe beside it."""
    objects = []
    translate = _translation(path)
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        if line.strip():
            found = object_of(line)
            if found is None:
                raise UsageError(f"{path}: line {number} is damaged; `gruppo train … --resume` removes it")
            objects.append(translate(found))
    return objects


def _translation(path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that converts a line written by an older version to the current names."""
    if path.name == "metrics.jsonl":
        parts = old_parts(path.parent)
        return lambda line: translate_metrics(line, parts)
    return translate_event if path.name == "events.jsonl" else dict


def old_parts(folder: Path) -> dict[str, str]:
    """See `gruppo.config.renames.renamed_parts`; empty if the folder has no readable recipe."""
    try:
        return renamed_parts(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def finite_number(value: Any) -> float | None:
    """A number of a foreign file as a float; None if it is none, or too large, or not finite."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def object_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if it is not an object."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: each has a step, and numbers or None. Raises UsageError otherwise."""
    return _checked(read_lines(path), path)


def metrics_in(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The same for what is in such a file; see `lines_in`."""
    return _checked(lines_in(content, path), path)


def _checked(lines: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        others = [name for name, value in line.items() if value is not None and type(value) not in (int, float)]
        if type(line.get("step")) is not int or others:
            name = others[0] if others else "step"
            raise UsageError(f"{path}, line {number}: {name!r} is not a number; restore the file from a copy")
    return lines


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The rows of a Parquet file, with the columns of the schema if one is given. Columns that not all files have are
    null where they are missing.

    Raises UsageError if the file is missing, is not such a table, does not match its checksums, or is too large once it
    is decompressed, which the size of the file does not show.
    """
    return pa.concat_tables(read_batches(path, schema))


def read_batches(path: Path, schema: pa.Schema | None = None) -> Iterator[pa.Table]:
    """The rows of a Parquet file in order, at most 256 at a time; one table without rows if there are none.

    The columns, and the errors, which the last rows may raise too: see `read_table`.
    """
    with _opened(path) as file:
        rows = 0
        for batch in _batches(path, file, schema, _ROWS):
            rows += len(batch)
            yield _current([batch], file, schema)
        if rows != file.metadata.num_rows:  # a damaged page header, which has no checksum, can hide a page
            raise ValueError(f"{rows} of {file.metadata.num_rows} rows can be read")
        if not rows:
            yield _current([], file, schema)


def matching_rows(path: Path, schema: pa.Schema, where: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The rows of a Parquet file whose columns have the values of `where`, in order, a few at a time.

    Only these columns are read of the whole file, so the memory does not depend on the number of its rows. Raises
    UsageError like `read_table`.
    """
    with _opened(path) as file:
        keys = pa.schema([schema.field(name) for name in where])
        table = _current(list(_batches(path, file, keys, _ROWS)), file, keys)
        chosen = [all(row[name] == value for name, value in where.items()) for row in table.to_pylist()]
        last = max((place for place, is_chosen in enumerate(chosen) if is_chosen), default=-1)
        start = 0
        for batch in _batches(path, file, schema, _FEW) if last >= 0 else ():
            wanted = chosen[start : start + len(batch)]
            start += len(batch)
            if any(wanted):
                yield _current([batch], file, schema).filter(pa.array(wanted))
            if start > last:
                return
        if last >= 0:
            raise ValueError(f"{start} of {file.metadata.num_rows} rows can be read")


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """An open table. What is wrong with it, found in the block, is raised as UsageError."""
    try:
        open_file(path).close()
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged, or not a table of a run"
        why = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{path}: {what} ({why}); restore it from a copy") from None


def _batches(path: Path, file: pq.ParquetFile, schema: pa.Schema | None, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of an open table, with the columns of the schema that it has, until they are too large."""
    old_names = {new: old for old, new in COLUMNS.items() if old in file.schema_arrow.names}
    wanted = None if schema is None else [old_names.get(name, name) for name in schema.names]
    size = 0
    for batch in file.iter_batches(rows, columns=wanted):
        size += batch.nbytes
        if size > MOST_TABLE:
            raise UsageError(f"{path}: contains more than {MOST_TABLE / 2**30:.0f} GiB of rows; it is not read")
        yield batch


def _current(batches: list[pa.RecordBatch], file: pq.ParquetFile, schema: pa.Schema | None) -> pa.Table:
    """Rows with the current names of their columns, and null for columns that not all files have."""
    table = pa.Table.from_batches(batches, batches[0].schema if batches else file.schema_arrow)
    table = table.replace_schema_metadata(None)
    table = table.rename_columns([COLUMNS.get(name, name) for name in table.column_names])
    for field in () if schema is None else schema:
        if field.name in _OPTIONAL and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table if schema is None else table.select(schema.names).cast(schema)


@contextmanager
def reading(what: Path, fix: str) -> Iterator[None]:
    """Turn errors of the block, which reads files that may be damaged or untrusted, into UsageErrors.

    The message names `what` and the `fix`. The error of a full disk is not converted.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # anything can be wrong with such a file
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        if "trust_remote_code" in str(error):  # from transformers; nothing is damaged
            raise UsageError(
                f"{what}: has Python files of its own, which run only if you allow it: read them, and pass "
                "trust_remote_code=True (on the command line --trust-remote-code)"
            ) from error
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"{what}: is damaged ({type(error).__name__}: {why}); {fix}") from error


def step_of(path: Path) -> int | None:
    """12 for step-000012 and step-000012.parquet; None for another name."""
    return step_of_name(path.name)


def step_of_name(name: str) -> int | None:
    """The same for the name alone."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def open_file(path: Path, links: bool = True) -> BinaryIO:
    """Open a file for reading. Raises OSError for a pipe or a device, and unless `links` for a link."""
    flags = os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)  # opening a pipe would wait for its other end
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code), str(path))
    return os.fdopen(number, "rb")


def own_table(run: Path, kind: str, step: int) -> Path:
    """The path of a table of a run, e.g. rollouts/step-000012.parquet.

    Raises UsageError if it, or its folder, is a link, which can lead out of the run's folder.
    """
    path = run / kind / f"step-{step:06d}.parquet"
    if os.path.islink(path) or os.path.islink(path.parent):
        raise UsageError(f"{path}: is a link; replace it with its target")
    return path


def read_content(path: Path, most: int = MOST_LINES) -> bytes:
    """The content of a file, decompressed if its name ends with .gz.

    Raises UsageError if it is larger than `most` bytes, OSError, and zlib.error if it cannot be decompressed.
    """
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        # Skips what a run appends meanwhile. Reading up to `most` bytes would reserve that much memory.
        content = b"" if size > most else stream.read(size)
    if path.suffix == ".gz" and content:
        content = zlib.decompressobj(wbits=31).decompress(content, most + 1)
        size = len(content)
    if size > most:
        raise UsageError(f"{path}: is larger than {most / 2**20:.0f} MiB; it is not read")
    return content


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is damaged ({error}); restore it from a copy, or use another folder") from None
