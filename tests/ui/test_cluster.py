"""What the top of a run's page says of ranks and engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gruppo.ui.catalog import Catalog
from gruppo.ui.cluster import Tile, cluster_tile
from gruppo.ui.live import LiveRun
from tests.ui.made import RECIPE, make_run
from tests.ui.visits import Visitor

LOST = {"step": 3, "kind": "engine_lost", "message": "engine 1 on host: ended"}
BACK = {"step": 3, "kind": "engine_back", "message": "engine 1 on host is back"}


def tile(
    run: Path, fields: str, metrics: Sequence[Mapping[str, Any]] = (), events: Sequence[Mapping[str, Any]] = ()
) -> Tile | None:
    live = LiveRun(make_run(run, f"{RECIPE}\n[cluster]\n{fields}\n", metrics, events))
    live.poll()
    (card,) = Catalog(run).cards()
    return cluster_tile(card, live)


@pytest.mark.parametrize("fields", ["", "trainers = 1\nengines = 0", "trainers = 'x'\nengines = -3", "lag = []"])
def test_a_single_process_has_no_tile(tmp_path: Path, fields: str) -> None:
    assert tile(tmp_path, fields) is None


def test_before_the_first_step_there_are_only_processes(tmp_path: Path) -> None:
    assert tile(tmp_path, "trainers = 2\nengines = 1\nlag = 1") == Tile("2 ranks, 1 engine", ("lag 1",), False)


def test_engines_lag_and_losses_of_the_last_step(tmp_path: Path) -> None:
    metrics = [
        {"step": step, "engine/0/version": step - 1, "engine/1/version": 1, "engine/2/version": step - 1,
         "engine/idle_share": 0.1 * step, "staleness/mean": 0.25 * step}
        for step in (2, 3)
    ]  # fmt: skip
    facts = ("weights of step 2, 1 of 3 behind", "engines 30% idle", "lag 2, staleness 0.75")
    assert tile(tmp_path, "engines = 3\nlag = 2", metrics) == Tile("1 rank, 3 engines", facts, False)
    lost = tile(tmp_path, "engines = 3\nlag = 2", metrics, [LOST, BACK, LOST])
    assert lost == Tile("1 rank, 3 engines", (*facts, "2 engines lost, 1 back"), True)
    back = tile(tmp_path, "engines = 3", metrics, [LOST, BACK])
    assert back == Tile("1 rank, 3 engines", (*facts[:2], "1 engine lost, 1 back"), False)


def test_ranks_that_started_again(tmp_path: Path) -> None:
    lost = {"step": 2, "kind": "rank_lost", "message": "rank 1 has ended: …; the run continues after step 2 on 2 ranks"}
    for count, words in ((1, "once"), (2, "2 times")):
        found = tile(tmp_path / words, "trainers = 2", events=[lost] * count)
        assert found == Tile("2 ranks", (f"ranks started again {words}",), False)


def test_engines_that_are_all_up_to_date(tmp_path: Path) -> None:
    metrics = [{"step": 1, "engine/0/version": 0, "engine/1/version": 0}]
    assert tile(tmp_path, "engines = 2", metrics) == Tile("1 rank, 2 engines", ("weights of step 0",), False)


def test_numbers_of_strangers_stay_short(tmp_path: Path) -> None:
    metrics = [{"step": 1, "engine/0/version": 1e300, "engine/idle_share": -1e300, "staleness/mean": 1e300}]
    found = tile(tmp_path, f"engines = {2**52}\nlag = {2**52}", metrics)
    assert found is not None
    assert found.facts == ("weights of step 1e+300", "lag 4,503,599,627,370,496, staleness 1e+300")


def test_the_page_shows_the_tile(tmp_path: Path, connect: Callable[..., TestClient]) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "one", RECIPE, [{"step": 1}])
    make_run(runs / "two", f"{RECIPE}\n[cluster]\ntrainers = 2\n", [{"step": 1}], [LOST])
    visitor = Visitor(connect(runs))
    shown = {}
    for card in Catalog(runs).cards():
        page = visitor.page(f"/r/{card.key}?part=head")
        shown[card.folder] = [part.text for part in page.all("dd") if part.parent and "Cluster" in part.parent.text]
    assert shown == {"one": [], "two": ["2 ranks", "1 engine lost, 0 back"]}
