"""A folder of runs, real, hostile and damaged, and the dashboard over it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from gruppo.runs.tables import ROLLOUTS
from gruppo.ui.app import create_app
from gruppo.ui.catalog import run_key
from tests.small_runs import small_run
from tests.ui.attacks import NAMES, harmless, write_damaged, write_run, write_table
from tests.ui.visits import HOST, Visitor

SECRET = "seventy-one-secrets"  # in files outside of the folder of runs
OLD = Path(__file__).parent.parent / "runs/revision_790d39a/run"


@dataclass(frozen=True)
class Runs:
    """Folders of runs below `root`, by name. `keys`: their names in addresses."""

    root: Path
    paths: dict[str, Path]

    def key(self, name: str) -> str:
        return run_key(os.path.relpath(self.paths[name], self.root))


@pytest.fixture(scope="session")
def real_runs(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two seeds of a small run that has evaluations with two answers to each question."""
    root = tmp_path_factory.mktemp("real")
    questions = root / "test.jsonl"
    questions.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    for seed in (0, 1):
        small_run(
            tiny_folder, root / f"seed-{seed}", run__seed=seed, run__name=f"tiny-{seed}", run__steps=4,
            evaluation__task=str(questions), evaluation__grader="exact_match", evaluation__every=2,
            evaluation__samples=2, evaluation__decoding={"temperature": 1.0}, sampling__prompts_per_step=2,
        )  # fmt: skip
    return Runs(root, {f"seed-{seed}": root / f"seed-{seed}" for seed in (0, 1)})


@pytest.fixture(scope="session")
def runs(real_runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Real runs, one of an older version, hostile ones with a harmless twin, damaged ones, and some with links."""
    root = tmp_path_factory.mktemp("runs") / "all"
    paths = {}
    for name, path in {**real_runs.paths, "old": OLD}.items():
        paths[name] = Path(shutil.copytree(path, root / name))
    paths["hostile"], paths["twin"] = write_run(root / NAMES[0]), write_run(root / "twin", harmless(), "words")
    for number, name in enumerate(NAMES[1:], start=1):
        paths[f"name-{number}"] = write_run(root / "deep" / name, harmless(8), "words")
    paths["bytes"] = write_run(root / "bytes", harmless(8), "words").rename(
        os.fsdecode(os.fsencode(root) + b"/pwned\xff")
    )
    paths |= write_damaged(root / "damaged")
    paths |= write_linked(root / "linked", root.parent / "outside")
    return Runs(root, paths)


def write_linked(root: Path, outside: Path) -> dict[str, Path]:
    """Runs with links to files outside of the folder, and with pipes in place of files."""
    secret = write_run(outside, [f"{SECRET} {number}" for number in range(8)], SECRET)
    files, folders, pipes, extends = (
        write_run(root / name, harmless(8), "words") for name in ("files", "folders", "pipes", "extends")
    )
    names = ("metrics.jsonl", "events.jsonl", "summary.json", "status.json", "environment.json", "rewards.log")
    tables = ("rollouts/step-000002.parquet", "evaluations/step-000002.parquet")
    for name in (*names, *tables):
        for run in (files, pipes):
            (run / name).unlink()
        (files / name).symlink_to(secret / name)
        os.mkfifo(pipes / name)
    (files / "results.json").symlink_to(secret / "summary.json")
    for name in ("rollouts", "evaluations"):
        shutil.rmtree(folders / name)
        (folders / name).symlink_to(secret / name)
    (root / "run").symlink_to(secret)
    (root / "recipe").mkdir()
    (root / "recipe/recipe.toml").symlink_to(secret / "recipe.toml")
    (outside / "base.toml").write_text(f'[model]\nname = "{SECRET}"\n[{SECRET}]\n')
    (extends / "recipe.toml").write_text(f"extends = {json.dumps(str(outside / 'base.toml'))}\n")
    write_table(secret / "rollouts/step-000003.parquet", ROLLOUTS, [])
    return {"linked-files": files, "linked-folders": folders, "pipes": pipes, "extends": extends}


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """A client of the dashboard over a folder: connect(folder, token=None, host="127.0.0.1")."""
    opened = []

    def client(root: Path, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
        app = create_app(root, token, host, tmp_path / "cache")
        made = TestClient(app, base_url=f"http://{HOST}", follow_redirects=False, raise_server_exceptions=False)
        opened.append(made.__enter__())
        return made

    yield client
    for made in opened:
        made.__exit__(None, None, None)


@pytest.fixture(scope="session")
def visitor(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    """Visits pages of the dashboard over `runs`."""
    app = create_app(runs.root, cache=tmp_path_factory.mktemp("cache"))
    with TestClient(app, base_url=f"http://{HOST}", follow_redirects=False, raise_server_exceptions=False) as client:
        yield Visitor(client)
