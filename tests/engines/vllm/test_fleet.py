"""A fleet of vLLM engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.policy import LanguageModel
from tests.engines.test_contract import make_policy

pytest.importorskip("ray")
if TYPE_CHECKING:
    from gruppo.engines.fleet.fleet import Fleet

REQUESTS = [Request((5, 6, 7 + number), [(number, index) for index in range(4)]) for number in range(6)]
GREEDY, RANDOM = SamplingParams(0.0, 12), SamplingParams(1.0, 24)


def tokens(groups: list[list[Any]]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in groups for completion in group]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    from gruppo.engines.fleet.opening import open_fleet

    policy = make_policy(initializer_range=0.1)
    tables = {"cluster": {"engines": 2}, "engine": {"name": "vllm", "memory": "500 MB"}}
    with ExitStack() as stack:
        recipe = load_recipe({"model": {"name": "m"}, **tables})
        built = open_fleet(policy, recipe, 16, policy.context, tmp_path_factory.mktemp("run"), stack)
        built.load_weights(policy.weight_source(), 0)
        yield built


def changed(policy: LanguageModel) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy.generation.advance()


def test_each_load_reaches_all_engines(fleet: Fleet) -> None:
    """The engines have other weights after a load: greedy tokens are those of the policy now."""
    for version in (1, 2):
        changed(fleet.policy)
        fleet.load_weights(fleet.policy.weight_source(), version)
        found = fleet.generate(REQUESTS, GREEDY)
        assert tokens(found) == tokens(NativeEngine(fleet.policy, 24).generate(REQUESTS, GREEDY))
        assert {completion.policy_version for group in found for completion in group} == {version}
    assert [member.version for member in fleet.members] == [2, 2]


def test_an_engine_that_is_lost_changes_no_token_and_leaves_no_process(fleet: Fleet) -> None:
    expected = tokens(fleet.generate(REQUESTS, RANDOM))
    hello = fleet.members[0].hello
    assert hello is not None
    processes = [psutil.Process(hello.pid), *psutil.Process(hello.pid).children(recursive=True)]
    assert len(processes) > 1, "vLLM has processes of its own"
    psutil.Process(hello.pid).kill()
    assert tokens(fleet.generate(REQUESTS, RANDOM)) == expected
    while fleet.members[0].version != fleet.version:
        fleet.generate(REQUESTS[:1], GREEDY)
    assert tokens(fleet.generate(REQUESTS, RANDOM)) == expected
    assert not [process for process in processes if process.is_running()]


def test_a_dead_vllm_is_a_dead_engine(fleet: Fleet) -> None:
    """Its actor lives on, and is replaced."""
    events: list[str] = []
    fleet.notify = lambda kind, message: events.append(f"{kind}: {message}")
    expected = tokens(fleet.generate(REQUESTS, RANDOM))
    hello = fleet.members[1].hello
    assert hello is not None
    for child in psutil.Process(hello.pid).children(recursive=True):
        child.kill()
    assert tokens(fleet.generate(REQUESTS, RANDOM)) == expected
    assert "vLLM failed while sampling" in events[0]
