"""Weights of every kind arrive at the engines, and nothing of old versions stays."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from gruppo.config.sections import Lora
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.fleet import parcels
from gruppo.models.lora import adapted_layers, add_adapters
from tests.conftest import make_policy
from tests.engines.fleet.conftest import MakeFleet, one_process

REQUESTS = [Request((5, 6, 7), [(0, index) for index in range(4)]), Request((8,), [(1, 0)])]
PARAMS = SamplingParams(1.0, 12)


@pytest.mark.parametrize("way", ["objects", "files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_carry_all_bits(
    open_new: MakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype
) -> None:
    """In several parcels. The engines sample what the trainer's own engine samples, to the last bit."""
    monkeypatch.setattr(parcels, "PARCEL_BYTES", 10_000)
    policy = make_policy(dtype, initializer_range=0.1)
    fleet = open_new(policy, weights=way)
    assert fleet._published is not None
    assert len(fleet._published.parcels) > 2
    for version in (1, 2):
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        policy.generation.advance()
        fleet.load_weights(policy.weight_source(), version)
        assert fleet.generate(REQUESTS, PARAMS) == one_process(policy, REQUESTS, PARAMS, version=version)
    folder = tmp_path / "engine_weights"
    assert [path.name for path in folder.glob("*")] == (["3"] if way == "files" else [])
    fleet.way.close()
    assert not folder.exists()


def test_adapters_are_merged(open_new: MakeFleet) -> None:
    adapted = add_adapters(make_policy(), Lora(rank=4), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(adapted.model).values():
            layer.lora_B["default"].weight.normal_(0, 0.3)
    adapted.generation.advance()
    fleet = open_new(adapted)
    assert fleet.generate(REQUESTS, PARAMS) == one_process(adapted, REQUESTS, PARAMS)


def test_a_sharded_trainers_weights_reach_its_copy_and_the_engines(open_new: MakeFleet) -> None:
    """The leader of several ranks has a copy to sample from, which then scores the probe."""
    trained, copy = make_policy(seed=3), make_policy(seed=4).sampling_copy()
    fleet = open_new(copy)
    fleet.load_weights(trained.weight_source(), 5)
    assert fleet.generate(REQUESTS, PARAMS) == one_process(trained, REQUESTS, PARAMS, version=5)
    assert one_process(copy, REQUESTS, PARAMS) == one_process(trained, REQUESTS, PARAMS)


def test_memory_does_not_grow_with_the_number_of_loads(open_new: MakeFleet) -> None:
    """verl#6468: the host's memory grew with each synchronization. 20 MB of weights, 12 times after the first five."""
    policy = make_policy(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, head_dim=64)
    fleet = open_new(policy)

    def resident() -> list[int]:
        """Without shared memory: each process maps the parts of Ray's store that it has read, in turn all of it."""
        pids = [member.hello.pid for member in fleet.members if member.hello is not None]
        memory = [psutil.Process(pid).memory_info() for pid in (*pids, None)]
        return [one.rss - one.shared for one in memory]

    for version in range(5):
        fleet.load_weights(policy.weight_source(), version)
    before = resident()
    for version in range(5, 17):
        fleet.load_weights(policy.weight_source(), version)
    size = sum(weight.nbytes for weight in policy.weights().values())
    assert size > 15e6
    assert all(after - first < size for first, after in zip(before, resident(), strict=True))
