"""A run whose engines are on two machines, which network namespaces stand in for. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from tests.cluster.compare import assert_close
from tests.engines.fleet.test_training import of_the_run
from tests.machines import TOKEN, Scene, no_machines, scene
from tests.outcomes import LOSSES, OF_LOSSES, differences, outcome
from tests.small_runs import recipe_folder

if why := no_machines():
    pytest.skip(why, allow_module_level=True)

CHANGES: dict[str, Any] = {"cluster__engines": 2, "cluster__patience": 15, "sampling__max_tokens": 24}


@pytest.fixture(scope="module")
def two() -> Iterator[Scene]:
    with scene(two=True) as found:
        yield found


@pytest.fixture(scope="module")
def recipe_file(two: Scene, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machines") / "recipe"
    return recipe_folder(folder, Path(tiny_folder), cluster__address=two.address, **CHANGES)


@pytest.fixture(scope="module")
def whole(two: Scene, recipe_file: Path) -> Path:
    """A run that nothing happens to."""
    out = recipe_file.parent / "whole"
    seen = set[str]()

    def look() -> None:
        seen.update(machine.namespace for machine in two.machines if machine.actors("EngineActor"))

    run(two, recipe_file, out, look)
    assert len(seen) == 2
    return out


def run(two: Scene, recipe_file: Path, out: Path, look: Callable[[], None]) -> None:
    """`gruppo train` on the first machine, with as many threads as the tests have. `look` is called meanwhile."""
    environment = os.environ | TOKEN | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "gruppo.cli.main", "train", str(recipe_file), "--out", str(out)]
    with (recipe_file.parent / "log.txt").open("w+") as log:
        process = subprocess.Popen(two.home.command(*command), env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while process.poll() is None:
            assert time.monotonic() < deadline
            look()
            time.sleep(0.01)
        log.seek(0)
        assert process.returncode == 0, log.read()


def test_a_run_on_two_machines_equals_the_run_in_one_process(whole: Path, recipe_file: Path, tmp_path: Path) -> None:
    alone = {name: table for name, table in tomllib.loads(recipe_file.read_text()).items() if name != "cluster"}
    train(alone, out=tmp_path / "one", progress=False)
    found, expected = of_the_run(whole), of_the_run(tmp_path / "one")
    assert (found["weights"], found["checkpoint"]) == (expected["weights"], expected["checkpoint"])
    for name in ("rollouts", "evaluations", "metrics"):
        assert_close(found[name], expected[name], 1e-6, name)


def test_a_machine_that_cannot_be_reached_is_done_without(two: Scene, whole: Path, recipe_file: Path) -> None:
    """Its link goes down while its engine samples. Ray has no other place for the engine."""
    out, lost = recipe_file.parent / "run", two.machines[1]
    sampled = out / "rollouts/step-000002.parquet"
    pids: list[int] = []

    def cut() -> None:
        if not pids and sampled.is_file():
            pids.extend(one.pid for one in lost.actors("EngineActor") if one.cmdline()[0].endswith(".sample"))
            if pids:
                lost.connect(False)

    try:
        run(two, recipe_file, out, cut)
    finally:
        two.restore()
    assert differences(outcome(out, OF_LOSSES, LOSSES), outcome(whole, OF_LOSSES, LOSSES)) == []
    (event,) = (event for event in read_lines(out / "events.jsonl") if event["kind"] == "engine_lost")
    assert f"(process {pids[0]} on {lost.namespace}): " in event["message"]
    assert "\n" not in event["message"]
