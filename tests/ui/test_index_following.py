"""The index follows tables that are added, replaced and deleted, and is never seen with half of one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from gruppo.ui import index_files
from gruppo.ui.index import Index
from gruppo.ui.index_files import TableFolder
from tests.ui.run_tables import evaluation, random_rollouts, raw_completions, raw_groups, records, rollouts, write


def one_group(reward: float, size: int = 2, group: int = 0) -> list[dict[str, Any]]:
    return [{"group": group, "completion": number, "reward": reward} for number in range(size)]


def means(index: Index) -> dict[int, float]:
    return {row["step"]: row["mean"] for row in index.steps().rows}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        write(tmp_path / "run", "rollouts", step, rollouts(one_group(step / 10), step))
    return tmp_path / "run"


@pytest.fixture
def index(run: Path, tmp_path: Path) -> Index:
    index = Index(run, tmp_path / "cache")
    assert index.update() == 3
    return index


def test_nothing_new(index: Index) -> None:
    assert index.update() == 0
    assert means(index) == {1: 0.1, 2: 0.2, 3: 0.3}


def test_new_tables_are_added(run: Path, index: Index) -> None:
    write(run, "rollouts", 4, rollouts(one_group(0.4), 4))
    write(run, "evaluations", 4, evaluation([{"prompt_id": "a"}]))
    assert index.update() == 2
    assert means(index) == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert [row["step"] for row in index.evaluations()] == [4]


def test_a_changed_table_is_replaced(run: Path, index: Index) -> None:
    write(run, "rollouts", 2, rollouts([*one_group(0.9), *one_group(0.9, group=1)], 2))
    assert index.update() == 2  # its rows are removed, and it is read again
    assert means(index) == {1: 0.1, 2: 0.9, 3: 0.3}
    assert index.counts()["groups"] == 4


def test_a_deleted_table_is_forgotten(run: Path, index: Index) -> None:
    (run / "rollouts/step-000002.parquet").unlink()
    assert index.update() == 1
    assert means(index) == {1: 0.1, 3: 0.3}
    assert index.group(2, 0) is None
    assert index.best(limit=5)[0]["step"] == 3


def test_a_deleted_folder(run: Path, index: Index) -> None:
    shutil.rmtree(run / "rollouts")
    assert index.update() == 3
    assert index.counts()["completions"] == 0


@pytest.mark.parametrize("last", [2, 3, 5])
@pytest.mark.parametrize("same_inodes", [False, True])
def test_a_resume_deletes_and_writes_again(run: Path, index: Index, last: int, same_inodes: bool) -> None:
    """The run goes on from step 1. It may be behind, level with or ahead of the step at which it stopped."""
    inodes = [(run / f"rollouts/step-{step:06d}.parquet") for step in (2, 3)]
    for step in range(2, last + 1):
        path = run / f"rollouts/step-{step:06d}.parquet"
        content = write(run, "rollouts", step + 100, rollouts(one_group(step), step))
        if same_inodes and path in inodes:  # the file system gives the same number again
            moment = content.stat().st_mtime_ns
            path.write_bytes(content.read_bytes())
            os.utime(path, ns=(moment, moment))
            content.unlink()
        else:
            content.replace(path)
    for path in inodes[max(0, last - 1) :]:
        path.unlink()
    index.update()
    assert means(index) == {1: 0.1} | {step: float(step) for step in range(2, last + 1)}


def test_another_run_in_the_same_folder(run: Path, index: Index) -> None:
    """What counts as right is a field of the recipe, so all tables are read again."""
    (run / "recipe.toml").write_text("[method]\nsuccess_threshold = 0.15\n")
    assert index.update() == 3
    assert [row["right"] for row in index.steps().rows] == [0, 2, 2]


def test_an_index_is_used_again(run: Path, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index.close()
    write(run, "rollouts", 4, rollouts(one_group(0.4), 4))
    read = []
    original = Index._read
    monkeypatch.setattr(
        Index, "_read", lambda self, kind, step, *rest: read.append(step) or original(self, kind, step, *rest)
    )
    again = Index(run, tmp_path / "cache")
    assert not again.private
    assert means(again) == {1: 0.1, 2: 0.2, 3: 0.3}
    again.update()
    assert read == [4]
    assert means(again) == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}


def test_an_index_that_was_closed_notices_changes_of_old_tables(run: Path, index: Index, tmp_path: Path) -> None:
    index.close()
    write(run, "rollouts", 1, rollouts(one_group(0.7), 1))
    again = Index(run, tmp_path / "cache")
    again.update()
    assert means(again) == {1: 0.7, 2: 0.2, 3: 0.3}


def test_a_folder_that_has_not_changed_is_not_listed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TableFolder(run, "rollouts")
    known = folder.changes({}).read
    folder.looked()
    os.utime(run / "rollouts", ns=(10**18, 10**18))
    assert folder.changes(known).read == {}
    folder.looked()

    def fails(path: Path) -> None:
        raise AssertionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fails)
        assert folder.changes(known).read == {}
    write(run, "rollouts", 4, rollouts(one_group(0.4), 4))
    assert list(folder.changes(known).read) == [4]


def test_only_the_newest_tables_are_looked_at_when_one_is_added(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not more often than `QUICK_LOOKS` in a row, and never if the newest known table has changed."""
    folder = TableFolder(run, "rollouts")
    known = folder.changes({}).read
    folder.looked()
    listed = []
    original = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or original(path))
    for step in range(4, 5 + index_files.QUICK_LOOKS):
        assert listed == []
        write(run, "rollouts", step, rollouts(one_group(0.4), step))
        found = folder.changes(known)
        assert (list(found.read), found.gone) == ([step], [])
        known |= found.read
        folder.looked()
    assert len(listed) == 1
    write(run, "rollouts", step, rollouts(one_group(0.5), step))
    write(run, "rollouts", step + 1, rollouts(one_group(0.5), step))
    assert list(folder.changes(known).read) == [step, step + 1]


def test_an_old_table_that_changes_while_one_is_added_is_found_with_the_next_look(run: Path, index: Index) -> None:
    write(run, "rollouts", 1, rollouts(one_group(0.9), 1))
    write(run, "rollouts", 4, rollouts(one_group(0.4), 4))
    index.update()
    assert means(index)[4] == 0.4
    index.update()
    assert means(index) == {1: 0.9, 2: 0.2, 3: 0.3, 4: 0.4}


def test_what_is_not_followed_is_found_again(run: Path) -> None:
    """Until the caller says that it has followed, nothing counts as seen."""
    folder = TableFolder(run, "rollouts")
    os.utime(run / "rollouts", ns=(10**18, 10**18))
    assert list(folder.changes({}).read) == [1, 2, 3]
    assert list(folder.changes({}).read) == [1, 2, 3]


@pytest.mark.parametrize(
    "name", ["step-1.parquet", "step-000009.parquet.writing", "step-0000009.parquet", "step-000009", "notes.txt",
             "step-٠٠٠٠٠٩.parquet", "step-999999999999999999.parquet"],
)  # fmt: skip
def test_other_files_are_no_tables(run: Path, index: Index, name: str) -> None:
    shutil.copy(run / "rollouts/step-000001.parquet", run / "rollouts" / name)
    assert index.update() == 0


def test_progress(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.ui.index._ROWS", 5)  # fewer than two tables have
    told: list[tuple[int, int]] = []
    index = Index(run, tmp_path / "cache")
    index.update(lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (2, 3), (3, 3)]
    index.update(lambda done, total: told.append((done, total)))
    assert len(told) == 3


def test_an_update_stops_when_the_index_is_closed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.ui.index._ROWS", 2)
    index = Index(run, tmp_path / "cache")
    closer = threading.Thread(target=index.close)

    def progress(done: int, total: int) -> None:
        if done == 1:
            closer.start()
            while not index._closed:
                pass

    index.update(progress)
    closer.join()
    again = Index(run, tmp_path / "cache")
    assert not again.private
    assert means(again) == {1: 0.1}
    again.update()
    assert means(again) == {1: 0.1, 2: 0.2, 3: 0.3}


def test_a_reader_sees_all_rows_of_a_table_or_none(run: Path, index: Index) -> None:
    """While one thread replaces a table again and again, another one asks for it."""
    variants = {0.25: 30, 0.75: 50}

    def replace() -> None:
        for number in range(24):
            reward = (0.25, 0.75)[number % 2]
            groups = [row for group in range(3) for row in one_group(reward, variants[reward], group)]
            write(run, "rollouts", 2, rollouts(groups, 2))
            index.update()

    seen = set()
    with ThreadPoolExecutor(1) as threads:
        replacing = threads.submit(replace)
        while not replacing.done():
            found = index.group(2, 1)
            if found is not None and found["mean"] != pytest.approx(0.2):
                reward = found["mean"]
                assert found["completions"] == len(found["rows"]) == len(found["rewards"]) == variants[reward]
                assert {row["reward"] for row in found["rows"]} == {reward}
                seen.add(reward)
            rows = index.groups(2).rows
            assert len({row["mean"] for row in rows}) <= 1
            assert len(rows) in (0, 1, 3)
    replacing.result()
    assert means(index) == {1: 0.1, 2: 0.75, 3: 0.3}
    assert seen


class Following(RuleBasedStateMachine):
    """Whatever happens to the tables, the index holds what pandas reads from them."""

    steps = st.integers(1, 6)
    folder: Path
    numbers: Iterator[int]

    def __init__(self) -> None:
        super().__init__()
        self.run, self.cache = self.folder / f"run-{next(self.numbers)}", self.folder / "cache"
        self.source = np.random.default_rng(0)
        self.index = Index(self.run, self.cache)

    @rule(step=steps)
    def write(self, step: int) -> None:
        write(self.run, "rollouts", step, random_rollouts(self.source, step, groups=2))

    @rule(step=steps)
    def damage(self, step: int) -> None:
        write(self.run, "rollouts", step, b"PAR1 nothing")

    @rule(step=steps)
    def delete(self, step: int) -> None:
        (self.run / f"rollouts/step-{step:06d}.parquet").unlink(missing_ok=True)

    @rule(step=steps, steps=st.integers(0, 3))
    def resume(self, step: int, steps: int) -> None:
        for path in self.run.glob("rollouts/*"):
            if index_files._step(path.name) >= step:
                path.unlink()
        for number in range(step, step + steps):
            self.write(number)

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = Index(self.run, self.cache)

    @rule()
    def update(self) -> None:
        while self.index.update():
            pass
        paths = sorted(self.run.glob("rollouts/*"))
        damaged = [index_files._step(path.name) for path in paths if path.read_bytes().startswith(b"PAR1 nothing")]
        assert [row["step"] for row in self.index.problems().rows] == damaged
        if len(paths) == len(damaged):
            assert self.index.counts()["groups"] == 0
            return
        expected = records(raw_groups(raw_completions(self.run)))
        found = self.index.groups().rows
        assert [(row["step"], row["group"], row["completions"], row["best"]) for row in found] == [
            (row["step"], row["group"], row["completions"], row["best"]) for row in expected
        ]

    def teardown(self) -> None:
        self.index.close()


def test_whatever_happens_to_the_tables(tmp_path: Path) -> None:
    Following.folder, Following.numbers = tmp_path, count()
    checks = settings(max_examples=15, stateful_step_count=12, deadline=None, database=None, derandomize=True,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(Following, settings=checks)
