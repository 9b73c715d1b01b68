"""The processes of the tests with several ranks. Ranks that a run starts itself need Ray: `make test-cluster`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gruppo.utils.imports import installed
from tests.cluster.team import Team, started

if not installed("ray"):
    collect_ignore = ["test_started.py"]


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with started(3, tmp_path_factory.mktemp("team")) as team:
        yield team
