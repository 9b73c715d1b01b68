"""Fleets need an environment with Ray: `make test-cluster`. Ray is started once a session, and fleets are reused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.fleet.pieces import pieces_of
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.policy import LanguageModel
from gruppo.types import Completion
from gruppo.utils.imports import installed

if not installed("ray"):
    collect_ignore_glob = [
        "test_contract.py",
        "test_faults.py",
        "test_machines.py",
        "test_torture.py",
        "test_training.py",
        "test_weights.py",
    ]

if TYPE_CHECKING:
    from gruppo.engines.fleet.fleet import Fleet

KEPT = 3  # fleets that wait to be used again
MakeFleet = Callable[..., "Fleet"]


def one_process(
    policy: LanguageModel, requests: list[Request], params: SamplingParams, slots: int = 64, version: int = 0
) -> list[list[Completion]]:
    """What one process samples in the pieces of two engines, one after the other."""
    engine = NativeEngine(policy, slots)
    engine.version = version
    groups: dict[int, list[Completion]] = {}
    for piece in pieces_of(requests, slots, 2):
        groups |= zip(piece.places, engine.generate(piece.requests, params), strict=True)
    return [groups[place] for place in range(len(requests))]


@pytest.fixture
def open_new(running_ray: None, tmp_path: Path) -> Iterator[MakeFleet]:
    """A fleet of its own for a test. `engine`: engine.name. The other options are fields of [cluster]."""
    from gruppo.engines.fleet.opening import open_fleet

    with ExitStack() as stack:

        def make(policy: LanguageModel, slots: int = 64, engine: str = "native", **cluster: Any) -> Fleet:
            tables = {"cluster": {"engines": 2, "patience": 60, **cluster}, "engine": {"name": engine}}
            recipe = load_recipe({"model": {"name": "m"}, **tables})
            fleet = open_fleet(policy, recipe, slots, policy.context, tmp_path, stack)
            fleet.load_weights(policy.weight_source(), 0)
            return fleet

        yield make


@pytest.fixture(scope="session")
def find(running_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeFleet]:
    """A fleet of a policy: a new one for the first policy of a kind, and the same one for later policies of it."""
    from gruppo.engines.fleet.opening import open_fleet

    started: dict[tuple[Any, ...], tuple[Fleet, ExitStack]] = {}
    folder = tmp_path_factory.mktemp("fleets")

    def make(policy: LanguageModel, slots: int = 64, engine: str = "native") -> Fleet:
        kind = policy.model.config.to_json_string(), policy.dtype, policy.eos_ids, engine
        if kind not in started:
            if len(started) == KEPT:
                started.pop(next(iter(started)))[1].close()
            recipe = load_recipe(
                {"model": {"name": "m"}, "cluster": {"engines": 2, "patience": 120}, "engine": {"name": engine}}
            )
            stack = ExitStack()
            started[kind] = open_fleet(policy, recipe, 2000, policy.context, folder, stack), stack
        fleet, _ = started[kind]
        fleet.policy, fleet.slots = policy, slots
        fleet.load_weights(policy.weight_source(), 0)
        return fleet

    yield make
    for _, stack in started.values():
        stack.close()
