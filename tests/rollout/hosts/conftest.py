"""Reward hosts need an environment with Ray: `make test-cluster`. Ray is started once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from gruppo.utils.imports import installed

if not installed("ray"):
    collect_ignore_glob = ["test_*.py"]

if TYPE_CHECKING:
    from gruppo.rollout.hosts.hosts import Hosts

MakeHosts = Callable[..., "Hosts"]


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    from gruppo.actors.runtime import Runtime
    from gruppo.config.cluster_section import Cluster

    runtime = Runtime(Cluster(reward_hosts=8), False, 0)
    yield
    runtime.close()


@pytest.fixture
def open_new(running_ray: None) -> Iterator[MakeHosts]:
    """Hosts of their own for a test, open until it ends."""
    from gruppo.rollout.hosts.hosts import Hosts

    with ExitStack() as stack:

        def make(count: int = 2, patience: float = 60.0) -> Hosts:
            hosts = Hosts(count, patience, "there is room")
            stack.callback(hosts.close)
            hosts.start()
            return hosts

        yield make
