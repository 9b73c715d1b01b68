"""Tables that are damaged, foreign or hostile, and caches that cannot be used."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.errors import RunError, UsageError
from gruppo.runs.tables import ADDED, ROLLOUTS
from gruppo.ui.index import Index, success_threshold
from tests.ui.run_tables import evaluation, random_rollouts, rollouts, write

ROWS = [{"group": 0, "completion": number, "reward": reward} for number, reward in enumerate((0.0, 1.0))]
GOOD = rollouts(ROWS)


def bytes_of(table: pa.Table, **settings: Any) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, **settings)
    return bytes(stream.getvalue())


def with_column(name: str, values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    return GOOD.set_column(GOOD.schema.get_field_index(name), name, pa.array(values, kind))


def flipped(content: bytes) -> bytes:
    """One bit of the first page is another one."""
    place = content.index(b"What is 1 + 1?")
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGED: dict[str, bytes | pa.Table] = {
    "empty file": b"",
    "text": b"PAR1, or so it says",
    "half a file": bytes_of(GOOD)[: len(bytes_of(GOOD)) // 2],
    "no footer": bytes_of(GOOD)[:-20],
    "a flipped bit": flipped(
        bytes_of(GOOD, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True)
    ),
    "another table": pa.table({"name": ["a"], "value": [1.0]}),
    "a missing column": GOOD.drop_columns(["advantages"]),
    "texts as rewards": with_column("reward", ["a", "b"]),
    "numbers as masks": with_column("mask", [1, 2]),
    "no group": with_column("group", [0, None], pa.int64()),
    "no prompt id": with_column("prompt_id", ["a", None]),
    "a negative group": with_column("group", [0, -1]),
    "a huge group": with_column("group", [0, 2**62]),
    "a huge completion": with_column("completion", [0, 2**20]),
    "a fractional group": with_column("group", [0.0, 0.5]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_reported_and_the_rest_is_read(content: bytes | pa.Table, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, "rollouts", 1, GOOD)
    path = write(run, "rollouts", 2, content)
    write(run, "rollouts", 3, GOOD)
    index = Index(run, tmp_path / "cache")
    index.update()
    assert [row["step"] for row in index.steps().rows] == [1, 3]
    assert index.counts()["damaged"] == 1
    (problem,) = index.problems().rows
    assert (problem["kind"], problem["step"]) == ("rollouts", 2)
    assert problem["problem"].startswith(f"{path}: ")
    assert "restore it from a copy" in problem["problem"]
    assert index.update() == 0
    write(run, "rollouts", 2, GOOD)
    index.update()
    assert index.problems().rows == []
    assert [row["step"] for row in index.steps().rows] == [1, 2, 3]


@pytest.mark.parametrize("column", ["eval_set", "prompt_id"])
def test_a_damaged_evaluation(column: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, "evaluations", 1, evaluation([{"prompt_id": "a"}, {"prompt_id": "b", column: None}]))
    write(run, "evaluations", 2, evaluation([{"prompt_id": "a"}]))
    index = Index(run, tmp_path / "cache")
    index.update()
    assert f"has rows without {column}" in index.problems().rows[0]["problem"]
    assert [row["step"] for row in index.evaluations()] == [2]


def test_a_table_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "run", "rollouts", 1, rollouts([]).cast(ROLLOUTS))
    index = Index(tmp_path / "run", tmp_path / "cache")
    index.update()
    assert index.counts() == {
        "steps": 0, "groups": 0, "completions": 0, "last": None, "evaluations": 0, "damaged": 0,
    }  # fmt: skip


def test_a_table_of_an_older_version(tmp_path: Path) -> None:
    later = [name for name in GOOD.column_names if name in frozenset().union(*ADDED.values())]
    assert later
    write(tmp_path / "run", "rollouts", 1, GOOD.drop_columns(later))
    index = Index(tmp_path / "run", tmp_path / "cache")
    index.update()
    assert index.problems().rows == []
    assert index.steps().rows[0]["mean"] == 0.5


def test_values_that_are_missing(tmp_path: Path) -> None:
    """Only group, completion and prompt id have to be there."""
    needed = ("group", "completion", "prompt_id")
    empty = pa.table({
        field.name: GOOD[field.name] if field.name in needed else pa.nulls(2, field.type) for field in ROLLOUTS
    })  # fmt: skip
    write(tmp_path / "run", "rollouts", 1, empty)
    index = Index(tmp_path / "run", tmp_path / "cache")
    index.update()
    found = index.group(1, 0)
    assert found is not None
    assert found["rewards"] == [None, None]
    names = ("prompt", "mean", "std", "best", "excluded", "trained", "right", "longest", "nonzero", "skipped")
    assert [found[name] for name in names] == ["", None, None, None, 2, 0, 0, 0, False, None]
    assert [found["rows"][0][name] for name in ("parts", "advantage", "right", "trained")] == [None, None, None, False]
    assert index.best() == []


def test_huge_numbers(tmp_path: Path) -> None:
    """A mean that overflows is null; nothing fails."""
    top = float(np.finfo(float).max)
    rows = [{"group": 0, "completion": number, "reward": top, "advantages": [top, top]} for number in range(2)]
    rows += [{"group": 2**20 - 1, "completion": 0, "reward": -top, "advantages": [5e-324]}]
    write(tmp_path / "run", "rollouts", 2**40 - 1, rollouts(rows))
    write(tmp_path / "run", "evaluations", 1, evaluation([{"prompt_id": "a", "sample": 2**63 - 1, "score": top}]))
    index = Index(tmp_path / "run", tmp_path / "cache")
    index.update()
    assert index.problems().rows == []
    first, last = index.groups().rows
    assert (first["mean"], first["best"], last["mean"], last["group"]) == (None, top, -top, 2**20 - 1)
    assert index.answers(1, "a").rows[0]["sample"] == 2**63 - 1


def test_long_and_odd_texts(tmp_path: Path) -> None:
    deep = '[{"content": ' + "[" * 5_000
    prompts = [
        "x" * 10_000,
        "",
        "[{not json",
        deep,
        '[{"role": "user", "content": "\\ud800 half"}]',
        '[{"content": 3}]',
    ]
    rows = [{"group": number, "prompt": prompt, "failure": "é" * 5_000, "reward_parts": "1" * 20_000}
            for number, prompt in enumerate(prompts)]  # fmt: skip
    write(tmp_path / "run", "rollouts", 1, rollouts(rows))
    index = Index(tmp_path / "run", tmp_path / "cache")
    index.update()
    found = [row["prompt"] for row in index.groups(1).rows]
    assert found[:5] == ["x" * 300, "", "[{not json", deep[:300], "? half"]
    one = index.group(1, 0)
    assert one is not None
    assert one["rows"][0]["failure"] == "é" * 1_000
    assert one["rows"][0]["parts"] is None


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "other", "rollouts", 1, GOOD)
    run = tmp_path / "run"
    write(run, "rollouts", 1, GOOD)
    (run / "rollouts/step-000002.parquet").symlink_to(outside)
    os.mkfifo(run / "rollouts/step-000003.parquet")
    (run / "rollouts/step-000004.parquet").mkdir()
    (run / "evaluations").symlink_to(outside.parent)
    index = Index(run, tmp_path / "cache")
    index.update()
    assert [row["step"] for row in index.steps().rows] == [1]
    assert index.evaluations() == []
    assert [row["problem"] for row in index.problems().rows] == [
        f"{run}/rollouts/step-00000{step}.parquet: is not a regular file; replace it with one" for step in (2, 3, 4)
    ]
    (run / "rollouts/step-000001.parquet").unlink()
    for path in run.glob("rollouts/*"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    (run / "rollouts").rmdir()
    (run / "rollouts").symlink_to(outside.parent)
    index.update()
    assert index.counts()["steps"] == index.counts()["damaged"] == 0
    (run / "rollouts").unlink()
    (run / "rollouts").symlink_to("rollouts")  # to itself
    index.update()
    assert index.counts()["steps"] == 0


@pytest.mark.parametrize(
    ("text", "threshold"),
    [("", 0.5), ("[method]\nsuccess_threshold = 0.2", 0.2), ("[method]\nsuccess_threshold = 1", 1.0),
     ("[method]\nsuccess_threshold = true", 0.5), ("[method]\nsuccess_threshold = nan", 0.5),
     ("[method]\nsuccess_threshold = 1e300", 0.5), ("method = 3", 0.5), ("[[[", 0.5), ("\udcff", 0.5),
     ("a = " + "[" * 3_000, 0.5)],
    ids=range(10),
)  # fmt: skip
def test_success_threshold_of_any_recipe(text: str, threshold: float) -> None:
    assert success_threshold(text.encode("utf-8", "surrogateescape")) == threshold


# The cache.


def filled(run: Path, cache: Path) -> Index:
    index = Index(run, cache)
    index.update()
    assert index.counts()["completions"] == 2
    return index


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run", "rollouts", 1, GOOD)
    return tmp_path / "run"


def test_the_run_folder_is_not_written_to(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    filled(run, tmp_path / "cache").close()
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_two_runs_have_two_indexes(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", "rollouts", 1, GOOD)
    filled(run, tmp_path / "cache")
    filled(tmp_path / "other", tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.duckdb"))) == 2


def test_a_cache_that_is_no_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    assert filled(run, tmp_path / "cache" / "deeper").private


def test_a_cache_that_is_read_only(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def refuses(path: Any, *arguments: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(path)
        return original(path, *arguments)

    monkeypatch.setattr(os, "open", refuses)
    assert filled(run, tmp_path / "cache").private


def test_no_space_for_temporary_files(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")

    def fails(**_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", fails)
    index = filled(run, tmp_path / "cache")
    assert index.private
    index.close()


def test_a_private_index_is_deleted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    index = filled(run, tmp_path / "cache")
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    index.close()
    assert list((tmp_path / "temporary").iterdir()) == []


def lock_of(run: Path, cache: Path) -> Path:
    return cache / f"{hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:32]}.lock"


def test_an_index_that_another_process_has_open(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    path = str(lock_of(run, tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert filled(run, tmp_path / "cache").private
        other.communicate(b"\n")
    assert not filled(run, tmp_path / "cache").private


def test_two_indexes_of_one_run_in_one_process(run: Path, tmp_path: Path) -> None:
    first, second = filled(run, tmp_path / "cache"), filled(run, tmp_path / "cache")
    assert (first.private, second.private) == (False, True)
    first.close()
    assert not filled(run, tmp_path / "cache").private


def test_the_lock_is_no_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").write_text("kept")
    lock_of(run, tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert filled(run, tmp_path / "cache").private
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_a_lock_is_released_when_an_index_is_dropped(run: Path, tmp_path: Path) -> None:
    index = filled(run, tmp_path / "cache")
    del index
    with lock_of(run, tmp_path / "cache").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("content", [b"", b"not a database", None], ids=["empty", "text", "flipped"])
def test_a_damaged_cache_is_begun_again(run: Path, tmp_path: Path, content: bytes | None) -> None:
    filled(run, tmp_path / "cache").close()
    (path,) = (tmp_path / "cache").glob("*.duckdb")
    whole = path.read_bytes()
    path.write_bytes(bytes(255 - byte for byte in whole[:20_000]) + whole[20_000:] if content is None else content)
    index = Index(run, tmp_path / "cache")
    assert not index.private
    assert index.counts()["steps"] == 0
    index.update()
    assert index.counts()["completions"] == 2


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_a_cache_that_is_damaged_behind_its_first_blocks(run: Path, tmp_path: Path, quarter: int) -> None:
    """It can be opened. What fails gives it up, and the tables are read again."""
    source = np.random.default_rng(0)
    for step in range(2, 40):
        write(run, "rollouts", step, random_rollouts(source, step, groups=60))
    Index(run, tmp_path / "cache").update()
    (path,) = (tmp_path / "cache").glob("*.duckdb")
    whole = path.read_bytes()
    size = len(whole) // 4
    place = size * quarter
    path.write_bytes(whole[:place] + bytes(size) + whole[place + size :])
    index = Index(run, tmp_path / "cache")
    for ask in (index.counts, index.steps, index.groups, index.best):
        with suppress(UsageError):
            ask()
    index.update()
    assert index.counts()["steps"] == 39
    assert len(index.best(limit=200)) == 200


@pytest.mark.parametrize(
    "change",
    ["UPDATE about SET version = 0", "UPDATE about SET run = 'another'", "DELETE FROM about", "DROP TABLE about"],
)
def test_a_cache_of_another_version_or_run_is_begun_again(run: Path, tmp_path: Path, change: str) -> None:
    filled(run, tmp_path / "cache").close()
    (path,) = (tmp_path / "cache").glob("*.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute(change)
    index = Index(run, tmp_path / "cache")
    assert not index.private
    assert index.counts()["steps"] == 0


def test_a_store_that_cannot_be_written_anymore(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the index goes on in a temporary folder; if that is full too, the message says what to do."""
    index = filled(run, tmp_path / "cache")
    original, failures = Index._commit, [1]

    def commit(self: Index, *arguments: Any) -> None:
        if failures and failures.pop():
            raise duckdb.IOException("IO Error: No space left on device")
        original(self, *arguments)

    monkeypatch.setattr(Index, "_commit", commit)
    write(run, "rollouts", 2, GOOD)
    index.update()
    assert index.private
    assert index.counts()["steps"] == 2
    assert list((tmp_path / "cache").glob("*.duckdb*")) == []
    failures[:] = [1, 1]
    write(run, "rollouts", 3, GOOD)
    with pytest.raises(RunError, match=r"cannot be written .* free some space in"):
        index.update()


def test_a_closed_index_says_so(run: Path, tmp_path: Path) -> None:
    index = filled(run, tmp_path / "cache")
    index.close()
    assert index.update() == 0
    with pytest.raises(UsageError, match="is closed"):
        index.counts()


def test_the_database_reads_no_files(run: Path, tmp_path: Path) -> None:
    """Should a value ever become part of a query, it reaches nothing outside the index."""
    connection = filled(run, tmp_path / "cache")._store.connection
    for query in ("SELECT * FROM read_text('/etc/hostname')", "COPY steps TO 'out.csv'", "INSTALL httpfs",
                  "SET enable_external_access = true", "ATTACH 'other.duckdb'"):  # fmt: skip
        with pytest.raises(duckdb.Error):
            connection.execute(query)
