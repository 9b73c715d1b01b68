"""The processes of the tests with several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.team import Team, started


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with started(3, tmp_path_factory.mktemp("team")) as team:
        yield team
