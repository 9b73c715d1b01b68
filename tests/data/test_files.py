"""The same rows from every file type, and one-line errors for broken files."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.data.files import read_file
from gruppo.errors import UsageError
from tests.data.load import Notes, questions, training

ROWS = [
    {"prompt": "What is 3 + 4?", "answer": "007", "note": "a,b"},
    {"prompt": 'Say "x"\nand\u2028go; ü', "answer": "1e5", "note": ""},
]


# Unpacks to ten gigabytes in a parser that expands entities.
BOMB = (
    '<!DOCTYPE r [<!ENTITY e0 "aaaaaaaaaa">'
    + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    + "]><r><p><prompt>&e9;</prompt></p></r>"
)


def save(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".xml":
        root = ElementTree.Element("rows")
        for row in rows:
            element = ElementTree.SubElement(root, "row", {"prompt": row["prompt"]})
            for name, value in list(row.items())[1:]:
                ElementTree.SubElement(element, name).text = value
        ElementTree.ElementTree(root).write(path, encoding="utf-8")
    elif suffix.lower() == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".CSV", ".PARQUET", ".xml"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path, suffix, ROWS)
    assert training(path) == ROWS
    assert questions(path).rows == ROWS


@pytest.mark.parametrize(
    "content",
    [
        '{"data": [{"prompt": "x"}]}',
        '{"version": "1", "rows": [{"prompt": "x"}], "tags": ["a"]}',
        '{"prompt": "x"}\n',
        '\ufeff[{"prompt": "x"}]',
    ],
)
def test_json_layouts(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content, encoding="utf-8")
    assert training(tmp_path / "r.json") == [{"prompt": "x"}]


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert [row["prompt"] for row in training(tmp_path / "r.json")] == ["x", "y"]


def test_an_object_with_messages_is_a_row(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "x"}], "answer": "y"}
    (tmp_path / "r.json").write_text(json.dumps(row))
    assert training(tmp_path / "r.json") == [row]
    alone = {"prompt": [{"role": "user", "content": "q"}]}
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    assert training(tmp_path / "alone.json") == [alone]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.json", "nonsense", ["r.json", "not JSON", "list of objects"]),
        ("r.json", "3", ["list of objects"]),
        ("r.json", "[1]", ["entry 1"]),
        ("r.json", "[]", ["no rows"]),
        ("r.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', ["several lists (a, b)"]),
        ("r.json", '{"prompt": ["a", "b"], "answer": ["c", "d"]}', ["object of lists", "one per row"]),
        ("r.csv", "", ["no rows"]),
        ("r.csv", "prompt,answer\n", ["no rows"]),
        ("r.csv", "prompt,answer\na,b\na,b,c\n", ["line 3", "3 values for 2 columns"]),
        ("r.csv", 'prompt,answer\n"a,b\n', ["line 2", "unexpected end"]),
        ("r.csv", "prompt;answer\na;b\n", ['options.delimiter = ";"']),
        ("r.csv", "prompt,prompt\na,b\n", ["a unique name"]),
        (
            "r.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}',
            ["line 2", '"prompt" 2 times', "every key once"],
        ),
        ("r.json", '[{"prompt": "a", "prompt": "b"}]', ['"prompt" 2 times', "every key once"]),
        ("r.json", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', ["line 2", '"prompt" 2 times']),
        ("r.parquet", "nonsense", ["r.parquet", "Parquet"]),
        ("r.xml", "nonsense", ["r.xml", "not XML"]),
        ("r.xml", "", ["not XML"]),
        ("r.xml", "<r><p><prompt>a</prompt></p>", ["not XML", "complete"]),
        (
            "r.xml",
            "<r><p><prompt>a</prompt><prompt>b</prompt></p></r>",
            ["line 1", "<p>", "same name (prompt, prompt)"],
        ),
        ("r.xml", "<r><p>a<prompt>b</prompt></p></r>", ["<p>", "text between its columns ('a')"]),
        ("r.xml", "<r><p><prompt>&x;</prompt></p></r>", ["undefined entity"]),
        ("r.xml", "<prompt>a</prompt>", ["no rows"]),
        ("r.xml", "<a>" * 100_000, ["more than 32 elements inside each other"]),
        ("r.xml", BOMB, ["document type declaration", "remove it"]),
        ("r.xml", '<!DOCTYPE r SYSTEM "file:///etc/passwd"><r><p><prompt>a</prompt></p></r>', ["document type"]),
        (
            "r.xml",
            '<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><r><p><prompt>&x;</prompt></p></r>',
            ["remove"],
        ),
        ("r.txt", "x", ["r.txt", ".jsonl", ".parquet"]),
    ],
)
def test_broken_files_are_reported_in_one_line(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        training(tmp_path / name)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes("prompt\nü\n".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        training(tmp_path / "r.csv")


def test_file_options(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt;answer\na;b\n")
    assert training(tmp_path / "r.csv", options={"delimiter": ";"}) == [{"prompt": "a", "answer": "b"}]
    with pytest.raises(UsageError, match=r"task\.options\.delimeter.*delimiter"):
        training(tmp_path / "r.csv", options={"delimeter": ";"})
    with pytest.raises(UsageError, match=r"task\.options\.delimiter = 'ab'"):
        training(tmp_path / "r.csv", options={"delimiter": "ab"})


def test_header_option_for_a_file_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text("a\tb\nc\td\n")
    rows = training(tmp_path / "r.tsv", options={"header": ["prompt", "answer"]})
    assert rows == [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    for header, words in (("prompt", "must be a list"), (["prompt"], "2 values for 1"), (["p", "p"], "unique name")):
        with pytest.raises(UsageError, match=words):
            training(tmp_path / "r.tsv", options={"header": header})
    with pytest.raises(UsageError, match=r"task\.options = .*no options"):
        training(save(tmp_path, ".parquet", ROWS), options={"x": 1})


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = save(tmp_path, ".jsonl", ROWS)
    assert training(path, split="train") == ROWS
    with pytest.raises(UsageError, match=r'task\.split = "test".*remove split'):
        training(path, split="test")


def test_parquet_values_become_plain(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "x", "name": None}, {"role": "system", "content": "y", "name": "n"}],
            "day": datetime.date(2020, 1, 2),
            "cost": decimal.Decimal("1.50"),
            "levels": [1, 2],
            "image": {"bytes": b"\x00", "path": "p"},
            "raw": b"\x00",
        }
    ]  # fmt: skip
    progress = Notes()
    assert training(save(tmp_path, ".parquet", rows), progress) == [
        {
            "prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y", "name": "n"}],
            "day": "2020-01-02",
            "cost": "1.50",
            "levels": [1, 2],
        }
    ]
    assert "image, raw" in progress.notes[0]


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.gz", "rows"])
def test_an_unknown_file_type_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown file type; write one of \.jsonl, \.json"):
        read_file(tmp_path / name, {}, 2**30, Notes())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_number_that_python_does_not_read(tmp_path: Path, name: str) -> None:
    row = '{"prompt": "a", "answer": ' + "7" * 5000 + "}"
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    with pytest.raises(UsageError, match="has a number of more than 4300 digits; write it as text"):
        list(read_file(tmp_path / name, {}, 2**30, Notes()))


def test_the_index_that_pandas_writes(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",prompt,answer\n0,a,1\n")
    rows = list(read_file(tmp_path / "rows.csv", {}, 2**30, Notes()))
    assert rows == [{"Unnamed: 0": "0", "prompt": "a", "answer": "1"}]
