"""Arrow data: fields that Arrow filled with nulls are left out, and what unpacks to too much is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.errors import UsageError
from gruppo.types import Row
from tests.data.load import Notes, given, training


def row(name: str, arguments: dict[str, Any], **columns: Any) -> Row:
    call = {"function": {"name": name, "arguments": arguments}}
    calls = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "and?", **columns.pop("user", {})},
    ]
    return {"prompt": calls, **columns}


ROWS = [
    row("weather", {"city": "Paris"}, info={"a": 1}, tools=[{"parameters": {"city": {"type": "string"}}}]),
    row("add", {"x": 3, "y": {"z": [1]}}, info={"b": "c"}, tools=[{"parameters": {"x": {"type": "number"}}}]),
    row("now", {"zone": "UTC"}, info={"c": {"d": True}}, tools=[], user={"name": "Ann"}),
]


def test_rows_of_different_tools_are_those_that_were_written(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    assert table.to_pylist() != ROWS, "Arrow fills the arguments of each tool with nulls"
    pq.write_table(table, tmp_path / "rows.parquet")
    assert training(tmp_path / "rows.parquet") == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert training(tmp_path / "saved") == ROWS
    assert given(datasets.Dataset.from_list(ROWS)) == ROWS
    assert given(table) == ROWS
    assert given(table.to_pandas()) == ROWS
    assert [list(row["prompt"][1]["tool_calls"][0]["function"]["arguments"]) for row in given(table)] == [
        ["city"], ["x", "y"], ["zone"],
    ]  # fmt: skip


def test_maps_become_objects_and_keep_their_nulls(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    table = pa.table({"prompt": ["a"], "info": pa.array([[("x", "1"), ("y", None)]], kind)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert training(tmp_path / "rows.parquet") == [{"prompt": "a", "info": {"x": "1", "y": None}}]


def test_a_null_that_a_file_of_text_writes_stays(tmp_path: Path) -> None:
    rows = [row("weather", {"city": None}), row("add", {"x": 1})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    assert training(tmp_path / "rows.jsonl") == rows


def test_columns_keep_their_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "level": [1, None]}), tmp_path / "rows.parquet")
    assert training(tmp_path / "rows.parquet") == [{"prompt": "a", "level": 1}, {"prompt": "b", "level": None}]


def test_missing_values_of_a_frame_are_none() -> None:
    frame = pd.DataFrame({
        "prompt": ["a", "b"],
        "answer": pd.array([1, pd.NA], "Int64"),
        "level": [1.5, float("nan")],
        "day": [pd.Timestamp("2020-01-02"), pd.NaT],
    })  # fmt: skip
    assert given(frame) == [
        {"prompt": "a", "answer": 1, "level": 1.5, "day": "2020-01-02 00:00:00"},
        {"prompt": "b", "answer": None, "level": None, "day": None},
    ]


BYTES = [{"prompt": "a", "image": b"x", "n": 1}, {"prompt": "b", "image": b"y", "n": 2}]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, pa.Table.from_pylist, pd.DataFrame])
def test_columns_with_bytes_from_python_are_left_out_with_a_note(kind: Any) -> None:
    progress = Notes()
    assert given(kind(BYTES), progress) == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    assert progress.notes == ["prompts: left out binary columns, such as images or audio: image"]


def test_a_column_is_left_out_of_all_rows_if_one_has_bytes_inside() -> None:
    rows = [{"prompt": "a", "images": []}, {"prompt": "b", "images": [{"bytes": b"x"}]}, {"prompt": "c"}]
    progress = Notes()
    assert given(rows, progress) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert len(progress.notes) == 1


@pytest.mark.parametrize("column", ["prompt", "answer", "solution", "tools"])
@pytest.mark.parametrize("kind", [list, pd.DataFrame])
def test_bytes_in_a_column_that_gruppo_reads_are_refused(column: str, kind: Any) -> None:
    rows = [{"prompt": "a", column: "[]"}, {"prompt": "b", column: b"7"}]
    with pytest.raises(UsageError, match=rf"prompts, row 2: {column} = b'7' has bytes; .*decode"):
        given(kind(rows))
    with pytest.raises(UsageError, match=r"prompts, row 1: answer = \[b'7'\] has bytes"):
        given([{"prompt": "a", "raw": [b"7"]}], columns={"answer": "raw"})


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "rows.parquet")
    frame = pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"])
    message = '2 columns are named "prompt"; give every column a unique name'
    for source in (table, frame):
        with pytest.raises(UsageError, match=f"^prompts: {message}"):
            given(source)
    with pytest.raises(UsageError, match=rf"rows\.parquet: {message}"):
        training(tmp_path / "rows.parquet")
    struct = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], ["role", "role"])
    with pytest.raises(UsageError, match='2 columns are named "role"'):
        given(pa.table([["a"], struct], names=["prompt", "info"]))


def repeated(text: str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))


LARGE = "x" * 1_000_000
BOMBS = {
    "text": {"prompt": repeated(LARGE, 4000)},
    "one row": {"prompt": ["a"], "l": pa.ListArray.from_arrays(pa.array([0, 4000], pa.int32()), repeated(LARGE, 4000))},
    "nested": {
        "prompt": ["a"] * 4000,
        "m": pa.StructArray.from_arrays([repeated(LARGE, 4000)], ["content"]),
    },
    "numbers": {"prompt": ["a", "b"], "l": pa.array([[1] * 8_000_000, []], pa.list_(pa.int8()))},
    "rows": {"prompt": repeated("a", 500_000)},
    "nulls": {
        "prompt": ["a"], "l": pa.ListArray.from_arrays(pa.array([0, 2_000_000], pa.int32()), pa.nulls(2_000_000)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(BOMBS[name]), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(
            UsageError, match=r'task\.memory = "0\.05 GB": the rows, unpacked, need more than that; raise it'
        ):
            training(path, memory="50 MB")
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": repeated("x" * 1000, 2000)}), path)
    with pytest.raises(UsageError, match=r"task\.memory"):
        training(path, memory="1 MB")
    assert len(training(path, memory="4 MB")) == 2000


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_files_count_too(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [{"prompt": "a", "l": [[]] * 1000}] * 100
    path.write_text({
        ".jsonl": "".join(json.dumps(entry) + "\n" for entry in rows),
        ".json": json.dumps(rows),
        ".csv": "prompt,b\n" + "a,b\n" * 20_000,
    }[suffix])  # fmt: skip
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UsageError, match=r"task\.memory"):
        training(path, memory="1 MB")
