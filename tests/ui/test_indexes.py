"""Indexes are opened on demand, updated in the background, and closed again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import RunError, UsageError
from gruppo.ui.index import Index
from gruppo.ui.indexes import Indexes, NotReadyError, default_cache
from tests.ui.run_tables import rollouts, write

LONG = 60.0  # seconds; no test waits so long unless it fails


def make_run(folder: Path, steps: int = 3) -> Path:
    for step in range(1, steps + 1):
        write(folder, "rollouts", step, rollouts([{"group": 0}], step))
    return folder


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[Indexes]:
    indexes = Indexes(tmp_path / "cache")
    yield indexes
    indexes.close()


class Gate:
    """Holds updates at their first call of `progress` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        original = Index.update

        def update(index: Index, progress: Any = None) -> int:
            def told(done: int, total: int) -> None:
                progress(done, total)
                self.reached.set()
                assert self.opened.wait(LONG)

            return original(index, told)

        monkeypatch.setattr(Index, "update", update)


def test_an_index_is_built_on_the_first_question(indexes: Indexes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert indexes.of(run, wait=LONG).counts()["steps"] == 3
    assert indexes.progress(run) == (True, 0, 0)


def test_progress_until_it_is_ready(indexes: Indexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    run = make_run(tmp_path / "run")
    with pytest.raises(NotReadyError) as caught:
        indexes.of(run, wait=0)
    assert (caught.value.done, caught.value.total) in ((0, 0), (0, 3))
    assert gate.reached.wait(LONG)
    assert indexes.progress(run) == (False, 0, 3)
    gate.opened.set()
    assert indexes.of(run, wait=LONG).counts()["steps"] == 3
    assert indexes.progress(run) == (True, 0, 0)


def test_changes_are_followed(indexes: Indexes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    index = indexes.of(run, wait=LONG)
    write(run, "rollouts", 4, rollouts([{"group": 0}], 4))
    assert indexes.of(run, wait=LONG, fresh=0.0) is index
    assert index.counts()["steps"] == 4


def test_a_ready_index_answers_while_it_is_updated(
    indexes: Indexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    indexes.of(run, wait=LONG)
    gate = Gate(monkeypatch)
    write(run, "rollouts", 4, rollouts([{"group": 0}], 4))
    assert indexes.of(run, wait=0, fresh=0.0).counts()["steps"] == 3
    assert gate.reached.wait(LONG)
    assert indexes.of(run, wait=0, fresh=0.0).counts()["steps"] == 3
    gate.opened.set()
    assert indexes.of(run, wait=LONG, fresh=0.0).counts()["steps"] == 4


def test_updates_are_not_too_frequent(indexes: Indexes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    indexes.of(run, wait=LONG)
    write(run, "rollouts", 4, rollouts([{"group": 0}], 4))
    assert indexes.of(run, wait=LONG, fresh=1e6).counts()["steps"] == 3
    assert indexes.of(run, wait=LONG, fresh=0.0).counts()["steps"] == 4


def test_an_update_that_had_begun_may_have_missed_the_newest_table(
    indexes: Indexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that follows a run asks once for each step, so it waits for an update that begins after its question."""
    run = make_run(tmp_path / "run")
    indexes.of(run, wait=LONG)
    gate = Gate(monkeypatch)
    write(run, "rollouts", 4, rollouts([{"group": 0}], 4))
    indexes.of(run, wait=0, fresh=0.0)
    assert gate.reached.wait(LONG)
    write(run, "rollouts", 5, rollouts([{"group": 0}], 5))
    threading.Timer(0.05, gate.opened.set).start()
    assert indexes.of(run, wait=LONG, fresh=0.0).counts()["steps"] == 5


def test_a_bounded_number_is_open(tmp_path: Path) -> None:
    indexes = Indexes(tmp_path / "cache", most=2)
    runs = [make_run(tmp_path / f"run-{number}") for number in range(3)]
    opened = [indexes.of(run, wait=LONG) for run in runs]
    with pytest.raises(UsageError, match="is closed"):
        opened[0].counts()
    assert [index.counts()["steps"] for index in opened[1:]] == [3, 3]
    indexes.of(runs[1], wait=LONG)  # the one that was not used for longest goes first
    again = indexes.of(runs[0], wait=LONG)
    assert not again.private
    assert opened[1].counts()["steps"] == again.counts()["steps"] == 3
    with pytest.raises(UsageError, match="is closed"):
        opened[2].counts()
    indexes.close()


def test_an_index_that_had_to_close_is_opened_again_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while updates of other runs keep all threads busy."""
    indexes = Indexes(tmp_path / "cache", most=3)
    runs = [make_run(tmp_path / f"run-{number}") for number in range(4)]
    first = indexes.of(runs[0], wait=LONG)
    gate = Gate(monkeypatch)
    for run in runs[1:]:
        with pytest.raises(NotReadyError):
            indexes.of(run, wait=0)
    assert gate.reached.wait(LONG)
    with pytest.raises(UsageError, match="is closed"):
        first.counts()
    gate.opened.set()
    assert not indexes.of(runs[0], wait=LONG).private
    indexes.close()


def test_closing_ends_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    indexes = Indexes(tmp_path / "cache")
    run = make_run(tmp_path / "run")
    with pytest.raises(NotReadyError):
        indexes.of(run, wait=0)
    assert gate.reached.wait(LONG)
    closing = threading.Thread(target=indexes.close)
    closing.start()
    gate.opened.set()
    closing.join(LONG)
    assert not closing.is_alive()
    assert not Index(run, tmp_path / "cache").private


def test_no_space(indexes: Indexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")

    def update(*_: Any) -> int:
        raise RunError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Index, "update", update)
        for _ in range(2):
            with pytest.raises(RunError, match="no space"):
                indexes.of(run, wait=LONG)
    assert indexes.of(run, wait=LONG).counts()["steps"] == 3


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "gruppo" / "ui"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "gruppo" / "ui"
