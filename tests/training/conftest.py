"""Small runs that several tests begin with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import small_run


@pytest.fixture(autouse=True, scope="module")
def forked(quick_workers: None) -> None:
    """Every test of this folder has quick workers."""


@pytest.fixture(scope="session")
def trained(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a finished small run with these changes, trained once for all tests, which leave it as it is."""
    folder, known = tmp_path_factory.mktemp("trained"), dict[str, Path]()

    def run(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            known[key] = small_run(tiny_folder, folder / f"{len(known)}", **changes).path
        return known[key]

    return run


@pytest.fixture
def copied(trained: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a run, in the test's folder `run`, that the test may change."""
    return lambda **changes: Path(shutil.copytree(trained(**changes), tmp_path / "run"))
