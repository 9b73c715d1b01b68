"""Rows of Arrow data: Parquet files, datasets of the `datasets` library, tables passed from Python.

Arrow gives every struct of a column the fields of all of them, filled with nulls: the arguments of one tool call get
those of all other tools. A null field of a struct is therefore left out. Only columns, which are the same in all
rows, and the `content` of messages keep their nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.data.values import is_missing, require_memory
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 4096  # rows that are decoded at a time
_SLICE = 2**26  # bytes of Python objects that are decoded at a time
ROW_BYTES, _VALUE = 184, 8  # least bytes of a row and of a value in Python
_DECODED = 120  # bytes of a value in Python at the peak: object, references, copies

Convert = Callable[[Any], Any]


def read_parquet(path: Path, limit: int, progress: Progress) -> Iterator[Row]:
    """The rows of a Parquet file, decoded batch by batch; columns with bytes are left out.

    Text is kept as indices into a dictionary until its size is known. Raises UsageError if the file cannot be read, or
    if a row, or all of the file, needs more than `limit` bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = carried_columns(file.schema_arrow, path.name, progress)
        require_memory(_least_bytes(file.metadata, names), limit)
        convert = {name: converter(file.schema_arrow.field(name).type) for name in names}
        texts = [column.path for column in map(file.schema.column, range(len(file.schema))) if _is_text(column)]
        for batch in pq.ParquetFile(path, read_dictionary=texts).iter_batches(_BATCH, columns=names):
            step = max(1, min(len(batch), len(batch) * _SLICE // max(1, _decoded_bytes(batch.to_struct_array()))))
            for start in range(0, len(batch), step):
                part = batch.slice(start, step)
                require_memory(_decoded_bytes(part.to_struct_array()), limit)
                for row in part.to_pylist():
                    yield {name: convert[name](value) for name, value in row.items()}
    except (OSError, RecursionError, pa.ArrowException) as error:
        raise UsageError(f"the file cannot be read ({error}); give a complete Parquet file") from None


def table_rows(table: pa.Table, source: str, progress: Progress) -> Iterator[Row]:
    """The rows of an Arrow table, in JSON types; columns with bytes are left out. `source`: its name in messages."""
    table = table.select(carried_columns(table.schema, source, progress))
    convert = {field.name: converter(field.type) for field in table.schema}
    for batch in table.to_batches(_BATCH):
        for row in batch.to_pylist():
            yield {name: convert[name](value) for name, value in row.items()}


def frame_rows(frame: Any, source: str) -> Iterator[Row]:
    """The rows of a data frame of pandas, in JSON types, and bytes; a missing value (NaN, NA, NaT) becomes None.

    The frame's objects are structs of Arrow if it comes from a file. `source`: its name in errors.
    """
    require_unique(list(frame.columns), source)
    for row in frame.to_dict("records"):
        values = {name: plain(value) for name, value in row.items()}
        yield {name: None if is_missing(value) else _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        kept = {"content"} if "role" in value else set()
        return _struct(value, dict.fromkeys(value, _without_nulls), kept)
    return value


def _least_bytes(metadata: Any, names: list[str]) -> int:
    """The least memory of these columns' rows: of each value, and of the content as it is in the file, uncompressed."""
    total = metadata.num_rows * ROW_BYTES
    for place in range(metadata.num_row_groups):
        group = metadata.row_group(place)
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in names):
                total += max(column.num_values * _VALUE, column.total_uncompressed_size)
    return int(total)


def _is_text(column: Any) -> bool:
    return bool(column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "JSON", "ENUM"))


def _decoded_bytes(array: Any) -> int:
    """About the peak memory of an array's values in Python: their texts, each counted as often as it occurs, and the
    objects and copies while rows are checked."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        if not (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)):
            return len(array) * _DECODED
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0) + len(array) * _DECODED
    if pa.types.is_struct(kind):
        return sum(map(_decoded_bytes, array.flatten()))
    if pa.types.is_map(kind):
        start, end = (array.offsets[place].as_py() for place in (0, len(array)))
        return sum(_decoded_bytes(part.slice(start, end - start)) for part in (array.keys, array.items))
    if pa.types.is_nested(kind):
        return _decoded_bytes(array.flatten())
    return int(array.nbytes) + len(array) * _DECODED


def carried_columns(schema: pa.Schema, name: str, progress: Progress) -> list[str]:
    """Names of the columns of an Arrow schema that contain no bytes; a progress note lists the columns left out.

    Raises UsageError if two columns, or two fields of a struct, have the same name.
    """
    _require_unique_fields(list(schema), name)
    dropped = [field.name for field in schema if _has_bytes(field.type)]
    note_left_out(dropped, name, progress)
    return [column for column in schema.names if column not in dropped]


def note_left_out(columns: Sequence[str], name: str, progress: Progress) -> None:
    """A progress note on the columns with bytes of a source that are left out, if there are any."""
    if columns:
        progress.note(f"{name}: left out binary columns, such as images or audio: {', '.join(columns)}")


def _require_unique_fields(fields: Sequence[Any], name: str) -> None:
    require_unique([field.name for field in fields], name)
    for field in fields:
        _require_unique_fields([field.type.field(place) for place in range(field.type.num_fields)], name)


def require_unique(names: Sequence[Any], source: str) -> None:
    """Raise UsageError if two columns have the same name. `source`: what has the columns, for the error."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(
            f'{source}: {names.count(repeated)} columns are named "{repeated}"; give every column a unique name'
        )


def _has_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return _has_bytes(kind.storage_type)
    return any(_has_bytes(kind.field(place).type) for place in range(kind.num_fields))


def converter(kind: pa.DataType) -> Convert:
    """The function that turns a Python value of this Arrow type into JSON types, without the null fields of structs.

    A map becomes an object, with its nulls.
    """
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {field.name: converter(field.type) for field in kind}
        kept = {"content"} if "role" in fields else set()
        return lambda value: _struct(value, fields, kept) if isinstance(value, Mapping) else plain(value)
    if pa.types.is_map(kind):
        item = converter(kind.item_type)
        return lambda value: _object(value, item) if isinstance(value, list) else plain(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        entry = converter(kind.value_type)
        if entry is not plain:
            return lambda value: [entry(item) for item in value] if isinstance(value, list) else plain(value)
    return plain


def _struct(value: Mapping[str, Any], fields: Mapping[str, Convert], kept: set[str]) -> dict[str, Any]:
    return {
        str(name): fields.get(name, plain)(item)
        for name, item in value.items()
        if item is not None or name in kept
    }  # fmt: skip


def _object(pairs: list[Any], convert: Convert) -> dict[str, Any]:
    return {str(key): convert(item) for key, item in pairs}


def plain(value: Any) -> Any:
    """A value in JSON types: arrays and tuples become lists, anything else that JSON cannot represent becomes text.

    The NA and NaT of pandas become None. Bytes stay, so that whoever reads the rows can leave them out or refuse them.
    """
    if value is None or isinstance(value, str | bool | int | float | bytes | bytearray | memoryview):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        if str(getattr(value, "dtype", "")).endswith("[ns]"):  # dates, which tolist would turn into integers
            value = value.astype(value.dtype.str.replace("ns", "us"))
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if is_missing(value) else str(value)
