"""Run folders may come from strangers. Whatever of one is read is read here, or after `require_own` has looked at it:
no link leads out of the folder, nothing in it is a device, and no file is larger, once read, than it may be."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.config.renames import COLUMNS, renamed_parts, translate_event, translate_metrics
from gruppo.errors import RunError, UsageError

MOST_JSON, MOST_LINES, MOST_TABLE = 64 * 2**20, 2**30, 8 * 2**30  # bytes; of a table, in memory
_ROWS = 256


def require_own(folder: Path, links_to: Path | None = None) -> None:
    """Raise UsageError where something in the folder is a link that leads out of it (unless into `links_to`), or
    neither a file nor a folder: reading it, or going on with the run, would reach what the folder does not hold."""
    roots = [each.resolve() for each in (folder, links_to) if each is not None]
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            try:
                mode = path.lstat().st_mode
                inside = not stat.S_ISLNK(mode) or (any(map(path.resolve().is_relative_to, roots)) and path.exists())
            except FileNotFoundError:
                continue  # a run is going on in the folder
            except (OSError, RuntimeError):  # a link to itself
                inside = False
            if not inside:
                raise UsageError(f"{path}: is a link that leads out of the folder; put in its place what it stands for")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise UsageError(f"{path}: is neither a file nor a folder; remove it")


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UsageError where it holds something else, and FileNotFoundError."""
    content = _json(_bytes(path, MOST_JSON), str(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is damaged (no object); put it back from a copy, or take another folder")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file. A last line that is still being written is left
    out, and so are blank ones. Raises UsageError for a line that is none."""
    if not path.is_file():
        return []
    made = []
    translate = _translation(path)
    for number, line in enumerate(_bytes(path, MOST_LINES).split(b"\n")[:-1], start=1):
        if line.strip():
            content = object_of(line)
            if content is None:
                raise UsageError(f"{path}: line {number} is damaged; `gruppo train … --resume` takes it out")
            made.append(translate(content))
    return made


def _translation(path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What puts the lines of a file that an older version wrote into the names of now."""
    if path.name == "metrics.jsonl":
        parts = old_parts(path.parent)
        return lambda line: translate_metrics(line, parts)
    return translate_event if path.name == "events.jsonl" else dict


def old_parts(folder: Path) -> dict[str, str]:
    """See `gruppo.config.renames.renamed_parts`; nothing where the folder has no recipe that can be read."""
    try:
        return renamed_parts(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def object_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object that bytes hold; None where they hold none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: each has a step, and numbers or None. Raises UsageError for others."""
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        others = [name for name, value in line.items() if value is not None and type(value) not in (int, float)]
        if type(line.get("step")) is not int or others:
            odd = others[0] if others else "step"
            raise UsageError(f"{path}, line {number}: {odd!r} is not a number; put the file back from a copy")
    return lines


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The rows of a Parquet file, with the columns of the schema where one is given. Raises UsageError for another file
    or none, for one that does not agree with its checksums, and for one that is too large once it is unpacked, which
    its size does not show."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            batches, size = [], 0
            new_names = {old: new for old, new in COLUMNS.items() if old in file.schema_arrow.names}
            old_names = {new: old for old, new in new_names.items()}
            wanted = None if schema is None else [old_names.get(name, name) for name in schema.names]
            for batch in file.iter_batches(_ROWS, columns=wanted):
                size += batch.nbytes
                if size > MOST_TABLE:
                    raise UsageError(f"{path}: holds more than {MOST_TABLE / 2**30:.0f} GiB of rows; it is not read")
                batches.append(batch)
            held = batches[0].schema if batches else file.schema_arrow
            table = pa.Table.from_batches(batches, held).replace_schema_metadata(None)
            table = table.rename_columns([new_names.get(name, name) for name in table.column_names])
            if len(table) != file.metadata.num_rows:  # a page's header, which has no checksum, says that it is no page
                raise ValueError(f"{len(table)} of {file.metadata.num_rows} rows can be read")
        return table if schema is None else table.select(schema.names).cast(schema)
    except (OSError, pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged, or no table of a run"
        why = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{path}: {what} ({why}); put it back from a copy") from None


@contextmanager
def reading(what: Path, fix: str) -> Iterator[None]:
    """Whatever fails in the block, which reads files that may be damaged or a stranger's, is a UsageError that names
    `what` and says the `fix`; a disk that is full is not."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # anything can be wrong with such a file
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        if "trust_remote_code" in str(error):  # of transformers, and no damage
            raise UsageError(
                f"{what}: has Python files of its own, which run only where that is asked for: read them, and write "
                "trust_remote_code=True (on the command line --trust-remote-code)"
            ) from error
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"{what}: is damaged ({type(error).__name__}: {why}); {fix}") from error


def step_of(path: Path) -> int | None:
    """12 for step-000012 and step-000012.parquet; None for another name."""
    found = re.fullmatch(r"step-(\d{6,18})(\.parquet)?", path.name, re.ASCII)
    return int(found[1]) if found else None


def _bytes(path: Path, most: int) -> bytes:
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise UsageError(f"{path}: has more than {most / 2**20:.0f} MiB; it is not read")
        return stream.read(size)  # what a run appends meanwhile is left out; a limit would be reserved in memory


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is damaged ({error}); put it back from a copy, or take another folder") from None
