"""Rows of a file: JSON Lines, JSON, CSV, TSV, Parquet and XML.

Values have the type that the file gives them: text in CSV stays text ("007", "1e5"), and nothing is guessed. Values
that JSON cannot represent (dates, decimals) become text. Rows are read one by one, so that no more than the limit of
the task's memory is used.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from gruppo.data.arrow import read_parquet
from gruppo.data.values import require_memory
from gruppo.data.xml_rows import read_xml
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.progress import Progress


def read_file(path: Path, options: Mapping[str, Any], limit: int, progress: Progress) -> Iterable[Row]:
    """The rows of a file, in the format that its suffix names.

    `options`: delimiter and header for CSV and TSV; none for other formats. `limit`: in bytes, of the memory that one
    row, or a file of text, may need; whoever keeps the rows adds them up. Raises UsageError if the suffix is unknown
    and, during iteration, if an option is unknown or the file is too large or cannot be read in this format.
    """
    read = FILES.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"{path.name}: unknown file type; write one of {', '.join(FILES)}")
    if path.is_file():
        require_memory(path.stat().st_size, limit)
    return read(path, options, limit, progress)


def _jsonl(path: Path, options: Mapping[str, Any], limit: int, progress: Progress) -> Iterator[Row]:
    _no_options(options, path)
    with _opened(path, newline="\n") as stream:
        yield from _lines(stream)


class _RepeatedKeyError(UsageError):
    """A JSON object has a key twice, of which a parser would keep one value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(
            f'an object has the key "{repeated}" {names.count(repeated)} times; give every key once'
        )
    return found


def _lines(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except _RepeatedKeyError as error:
            raise _RepeatedKeyError(f"line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            if _is_long_number(error):
                raise UsageError(
                    f"line {number} has a number of more than {_digits()} digits; write it as text"
                ) from None
            raise UsageError(f"line {number} is not JSON ({error}); write one object per line") from None
        if not isinstance(row, dict):
            raise UsageError(
                f"line {number} is {str(row)[:40]!r}; write one object per line, or rename a file "
                "that is one list to .json"
            )
        yield row


def _is_long_number(error: Exception) -> bool:
    """Whether the text is JSON, with a number that Python does not read because that would take long."""
    return type(error) is ValueError


def _digits() -> int:
    return sys.get_int_max_str_digits()


def _json(path: Path, options: Mapping[str, Any], limit: int, progress: Progress) -> list[Row]:
    """Rows from a list of objects, an object that contains one list of objects, or JSON Lines with the wrong suffix."""
    _no_options(options, path)
    with _opened(path) as stream:
        text = stream.read()
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except _RepeatedKeyError:
        raise
    except (ValueError, RecursionError) as error:
        if _is_long_number(error):
            raise UsageError(f"the file has a number of more than {_digits()} digits; write it as text") from None
        try:
            return list(_lines(text.split("\n")))
        except _RepeatedKeyError:
            raise
        except UsageError:
            raise UsageError(f"the file is not JSON ({error}); write a list of objects") from None
    if isinstance(content, dict):
        content = _only_list(content)
    if not isinstance(content, list):
        raise UsageError(f"the file contains {str(content)[:40]!r}; write a list of objects")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise UsageError(f"entry {number} is {str(row)[:40]!r}; write a list of objects")
    return content


def _only_list(content: dict[str, Any]) -> list[Any]:
    """The list of rows in an object such as {"data": […]}; an object without one is itself a row."""
    objects = {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
    }
    lists = {key: value for key, value in objects.items() if not {"role", "content"} <= set(value[0])}  # skip messages
    if len(lists) > 1:
        raise UsageError(f"the file contains several lists ({', '.join(lists)}); keep only the one with the rows")
    if not objects and content and all(isinstance(value, list) for value in content.values()):
        raise UsageError(f"the file is an object of lists ({', '.join(content)}); write a list of objects, one per row")
    return next(iter(lists.values())) if lists else [content]


def _csv(path: Path, options: Mapping[str, Any], limit: int, progress: Progress) -> Iterator[Row]:
    """Rows of a file with a header; all values are text.

    `delimiter`: the separator of columns; default: a comma, in .tsv a tab. `header`: column names for a file without a
    header.
    """
    if unknown := set(options) - {"delimiter", "header"}:
        raise UsageError(f"options.{min(unknown)}: unknown; the options of a {path.suffix} file are delimiter, header")
    delimiter = options.get("delimiter", "\t" if path.suffix.lower() == ".tsv" else ",")
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise UsageError(f'options.delimiter = {delimiter!r}: must be one character; write e.g. ";"')
    header = options.get("header", [])
    if not isinstance(header, list | tuple) or not all(isinstance(name, str) for name in header):
        raise UsageError(f'options.header = {header!r}: must be a list of names; write e.g. ["question", "answer"]')
    header = _header(list(header), delimiter) if header else []
    for line, values in _values(path, delimiter):
        if not header:
            header = _header(values, delimiter)
        elif len(values) != len(header):
            raise UsageError(
                f"line {line} has {len(values)} values for {len(header)} columns; put quotes around "
                f"values that contain {delimiter!r} or line breaks, or set options.delimiter"
            )
        else:
            yield dict(zip(header, values, strict=True))


def first_values(path: Path) -> list[str]:
    """Values of the first non-blank line of a CSV or TSV file: its header, if it has one. [] for an empty file."""
    return next((values for _, values in _values(path, "\t" if path.suffix.lower() == ".tsv" else ",")), [])


def _values(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of every line that is not blank."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                if any(values):
                    yield reader.line_num, values
        except csv.Error as error:
            raise UsageError(f"line {reader.line_num}: {error}; double the quotes inside a quoted value") from None


def _header(names: list[str], delimiter: str) -> list[str]:
    other = next((mark for mark in ";\t|," if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        raise UsageError(
            f"the header {names[0][:60]!r} is a single column with the delimiter {delimiter!r}; "
            f"write options.delimiter = {json.dumps(other)}"
        )
    if names.count("") == 1:  # such as the index that pandas writes; pandas reads it under this name
        names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"the header is {names}; give every column a unique name")
    return names


def _parquet(path: Path, options: Mapping[str, Any], limit: int, progress: Progress) -> Iterator[Row]:
    _no_options(options, path)
    return read_parquet(path, limit, progress)


def _xml(path: Path, options: Mapping[str, Any], limit: int, progress: Progress) -> Iterator[Row]:
    _no_options(options, path)
    return read_xml(path)


@contextmanager
def _opened(path: Path, newline: str = "") -> Iterator[TextIO]:
    """The file, to be read as text in the block; its lines end as `newline` says (see `open`)."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file cannot be read ({error}); give a readable UTF-8 file") from None


def _no_options(options: Mapping[str, Any], path: Path) -> None:
    if options:
        raise UsageError(f"options = {dict(options)}: a {path.suffix} file has no options; remove them")


FILES: dict[str, Callable[[Path, Mapping[str, Any], int, Progress], Iterable[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".xml": _xml,
}
