"""A folder of files gives the rows of its files, in the splits that `datasets` puts the files in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.errors import UsageError
from tests.data.load import Notes, both_sides, questions, training

TEXTS = ["007", "1e5", "None", "NA", "2020-01-02", "", "7"]
MIXED = [{"prompt": "a", "answer": "7", "day": "2020-01-02"}, {"prompt": "b", "answer": 7}, {"prompt": "3", "n": [1]}]


def table(delimiter: str = ",") -> str:
    return "".join(f"{a}{delimiter}{b}\n" for a, b in [("prompt", "answer"), *((n, t) for n, t in enumerate(TEXTS))])


def lines(*prompts: str) -> str:
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture(autouse=True)
def only_gruppo(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **options: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": f"datasets {options}"}])})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", table()),
        ("train.tsv", table("\t")),
        ("TRAIN.CSV", table()),
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in MIXED)),
        ("rows.json", json.dumps({"data": MIXED})),
        ("train-00000-of-00001.xml", '<rows><row prompt="3"><answer>007</answer></row></rows>'),
    ],
)
def test_a_folder_gives_the_rows_of_its_file(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / "e", {name: content})
    rows = training(tmp_path / "e" / name)
    assert training(tmp_path / "e") == rows
    if "," in content and name.endswith("csv"):
        assert [row["answer"] for row in rows] == TEXTS


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(
            pa.table({"prompt": [f"{number}"], "image": [b"x"], "n": [number]}), tmp_path / f"train-{number}.parquet"
        )
    progress = Notes()
    assert training(tmp_path, progress) == [{"prompt": "0", "n": 0}, {"prompt": "1", "n": 1}]
    assert [note.split(":")[0] for note in progress.notes] == ["train-0.parquet", "train-1.parquet"]


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        ({"train.jsonl": lines("a"), "test.jsonl": lines("b")}, ["a"], ["b"]),
        ({"my_train.csv": "prompt\na\n", "eval-1.jsonl": lines("b")}, ["a"], ["b"]),
        ({"x/training/1.jsonl": lines("a"), "x/testing/1.json": lines("b"), "other.csv": "c\n"}, ["a"], ["b"]),
        ({"2.jsonl": lines("c"), "1.csv": "prompt,more\na,b\n", "d/3.jsonl": lines("d")}, ["a", "c", "d"], None),
        (
            {
                "data/train-00001-of-00002.jsonl": lines("c"),
                "data/train-00000-of-00002.jsonl": lines("a", "b"),
                "data/test-00000-of-00001.jsonl": lines("d"),
                "data/rare-00000-of-00001.jsonl": lines("e"),
            },
            ["a", "b", "c"],
            ["d"],
        ),
        ({"train-train.jsonl": lines("a"), ".train.jsonl": lines("b"), "__pycache__/x.jsonl": lines("c")}, ["a"], None),
        (
            {
                "a.csv": "prompt\na\n",
                "LICENSE": "free",
                "run.py": "",
                "a.csv.bak": "prompt\nb\n",
                "one.toml": "",
                "two.toml": "",
                "notes.md": "",
                "README.md": "---\nlicense: mit\n---\nRows.",
            },
            ["a"],
            None,
        ),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, files: dict[str, str], train: list[str], test: list[str] | None) -> None:
    write(tmp_path, files)
    assert [row["prompt"] for row in training(tmp_path)] == train
    if test is None:
        with pytest.raises(UsageError, match=r'split = "test": no such split; write one of: train'):
            questions(tmp_path)
        return
    assert [row["prompt"] for row in questions(tmp_path).rows] == test
    assert [row["prompt"] for row in both_sides(tmp_path)[1].rows] == test


def test_a_selection_of_rows(tmp_path: Path) -> None:
    write(tmp_path, {"train_1.jsonl": lines("a", "b", "c"), "train_2.jsonl": lines("d"), "test.jsonl": lines("e")})
    for split, prompts in {
        "train[:2]": "ab",
        "train[50%:]": "cd",
        "train[-1:]+test": "de",
        "test+train[1:3]": "ebc",
    }.items():
        assert "".join(row["prompt"] for row in training(tmp_path, split=split)) == prompts
    for split in ("dev", "dev[:1]", "train[x]"):
        with pytest.raises(UsageError, match=r"task\.split = .*(train, test|train\[:100\])"):
            training(tmp_path, split=split)


def test_options_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, {"data/a.csv": "007;b\n", "data/b.csv": "x;y\n"})
    options: dict[str, Any] = {"delimiter": ";", "header": ["prompt", "answer"]}
    first, second = {"prompt": "007", "answer": "b"}, {"prompt": "x", "answer": "y"}
    assert training(tmp_path, options=options) == [first, second]
    assert training(tmp_path, options={**options, "data_dir": "data", "data_files": "b.csv"}) == [second]
    files = {"train": "data/b.csv", "dev": ["data/a.csv"]}
    assert training(tmp_path, options={**options, "data_files": files}, split="dev") == [first]
    with pytest.raises(UsageError, match=r"task\.name = .*cannot be loaded .*no\.csv"):
        training(tmp_path, options={"data_files": "no.csv"})
    write(tmp_path, {"c.jsonl": lines("a")})
    with pytest.raises(UsageError, match=r"task\.options = .*a \.jsonl file has no options"):
        training(tmp_path, options=options)


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ({"README.md": "---\nconfigs:\n- config_name: main\n  data_files: a.csv\n---\n"}, {}),
        ({"README.md": "---\ndataset_info:\n  features: []\n---\n"}, {}),
        ({".huggingface.yaml": "configs: []\n"}, {}),
        ({"b.ndjson": lines("b")}, {}),
        ({"b.arrow": "", "c.arrow": ""}, {}),
        ({"b.zip": ""}, {}),
        ({}, {"name": "main"}),
        ({}, {"data_files": "hf://datasets/a/b/c.csv"}),
    ],
)
def test_what_datasets_reads_itself(tmp_path: Path, files: dict[str, str], options: dict[str, Any]) -> None:
    write(tmp_path, {"a.csv": "prompt\n007\n", **files})
    ((prompt,),) = (row.values() for row in training(tmp_path, options=options))
    assert prompt == f"datasets { ({'split': None, **options}) }"


def test_compressed_files_are_read_by_datasets(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": "prompt\n007\n"})
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"prompt\n8\n"))
    assert training(tmp_path)[0]["prompt"].startswith("datasets")


def test_a_broken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": lines("a"), "part/b.csv": "prompt,answer\na\n", "c.parquet": ""})
    with pytest.raises(UsageError, match=r"task\.name = .*: c\.parquet: the file cannot be read"):
        training(tmp_path)
    (tmp_path / "c.parquet").unlink()
    with pytest.raises(UsageError, match=r"task\.name = .*: part/b\.csv: line 2 has 1 values for 2 columns"):
        training(tmp_path)
    with pytest.raises(UsageError, match=r"task\.memory = "):
        training(write(tmp_path / "large", {"a.jsonl": lines("a" * 2000)}), memory="1 KB")
