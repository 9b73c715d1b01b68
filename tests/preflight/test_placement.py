"""The placement of the processes of a [cluster]: what `gruppo check` shows and refuses. All figures by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.models.loading import find_model, load_model
from gruppo.preflight import placement as module
from gruppo.preflight.check import check_recipe, describe_check
from gruppo.preflight.placement import (
    Machine,
    Placement,
    check_placement,
    measure_machine,
    measure_sent,
    place_processes,
)
from gruppo.training.memory_estimate import Memory
from tests.small_runs import ROWS, recipe

GB = 10**9
MEMORY = Memory(
    process=1 * GB, weights=8 * GB, optimizer=16 * GB, reference=4 * GB, critic=0, reward_model=0, prepared=3 * GB,
    cache=5 * GB, work=2 * GB, evaluation_cache=6 * GB, evaluation_work=2 * GB, gradients=8 * GB, activations=10 * GB,
    logits=1 * GB, backward=0,
)  # fmt: skip
RANKS = Memory(**{
    **vars(MEMORY), "weights": 2 * GB, "optimizer": 4 * GB, "reference": GB, "gradients": 2 * GB, "prepared": 0,
    "versions": 4 * GB, "gathered": 2 * GB,
})  # fmt: skip
SENT = 4 * GB
CPU = Machine(devices=0, free=100 * GB, total=120 * GB, shared=60 * GB, rate=2.0 * GB)
CUDA = CPU._replace(devices=8, free=80 * GB, total=80 * GB)


def cluster(**fields: Any) -> Recipe:
    engine = {"name": fields.pop("engine"), "memory": fields.pop("memory", 0.5)} if "engine" in fields else {}
    data = recipe("model") | {"task": {"name": "rows.jsonl"}, "cluster": fields}
    return load_recipe({**data, **({"engine": engine} if engine else {})})


def placed(settings: Recipe, machine: Machine = CPU, memory: Memory | None = None) -> Placement:
    assert settings.cluster is not None
    found = place_processes(settings, memory or (RANKS if settings.cluster.trainers > 1 else MEMORY), SENT, machine)
    assert found is not None
    return found


def in_gb(found: Placement) -> dict[str, dict[str, float]]:
    return {member.name: {name: size / GB for name, size in member.parts.items() if size} for member in found.members}


def test_one_process_has_no_placement() -> None:
    assert place_processes(load_recipe(recipe("model") | {"task": {"name": "a"}}), MEMORY, SENT, CPU) is None
    assert place_processes(cluster(trainers=1), MEMORY, SENT, CPU) is None


def test_ranks_hold_shards_and_the_leader_a_copy_to_sample_from() -> None:
    found = placed(cluster(trainers=4))
    shards = {"weights": 2, "optimizer": 4, "reference": 1, "gradients": 2, "gathered": 2}
    rank = shards | {"process": 1, "activations": 10, "logits": 1}
    assert in_gb(found) == {"rank 0": rank | {"versions": 4}, "ranks 1-3": rank}
    assert [(member.count, member.place) for member in found.members] == [(1, "leader, CPU"), (3, "followers, CPU")]
    asked = "3 times 1 CPU for ranks (unless torchrun starts them), on this machine, and an object store of 0.21 GB"
    assert (found.ray, found.transfer_bytes, found.transfer_seconds) == (asked, 4 * GB, 2.0)


def test_the_leader_may_need_most_while_it_samples() -> None:
    assert "cache" not in placed(cluster(trainers=2)).members[0].parts
    found = placed(cluster(trainers=8), memory=Memory(**{**vars(RANKS), "cache": 50 * GB})).members
    assert found[0].parts["cache"] == 50 * GB
    assert "activations" not in found[0].parts
    assert "cache" not in found[1].parts


def test_native_engines_take_over_the_sampling() -> None:
    found = placed(cluster(engines=3))
    assert in_gb(found) == {
        "rank 0": {"process": 1, "weights": 8, "optimizer": 16, "reference": 4, "prepared": 3, "gradients": 8,
                   "activations": 10, "logits": 1},
        "engines 0-2": {"process": 1, "weights": 4, "prepared": 3, "cache": 6, "work": 2},
    }  # fmt: skip
    assert found.ray == "3 times 1 CPU for engines, on this machine, and an object store of 10.00 GB"


def test_vllm_engines_split_their_weights_and_cache_in_the_rest() -> None:
    found = placed(cluster(trainers=2, engines=2, engine_devices=2, engine="vllm"), CUDA)
    assert in_gb(found)["engines 0-1"] == {"weights": 2, "cache": 38}
    assert [member.place for member in found.members] == [
        "leader, the first CUDA device of its machine", "follower, 1 more CUDA device",
        "vllm, 2 CUDA devices for each",
    ]  # fmt: skip
    assert found.ray.startswith(
        "1 times 1 CPU and 1 GPU for ranks (unless torchrun starts them), 2 times 1 CPU and 2 GPUs"
    )
    assert in_gb(placed(cluster(engines=1, engine="vllm")))["engine 0"] == {"weights": 8, "cache": 52}


def test_a_ray_that_runs_is_not_asked() -> None:
    found = placed(cluster(engines=1, address="10.0.0.1:6379"))
    assert found.ray == '1 times 1 CPU for engines, on any machine of the Ray at "10.0.0.1:6379", which was not asked'


@pytest.mark.parametrize(
    ("settings", "machine", "severity", "words"),
    [
        ({"trainers": 2}, CPU, "ok", "2 ranks and 0 engines"),
        ({"engines": 2}, CPU._replace(free=82 * GB), "problem", "rank 0, engines 0-1: 83.00 GB together"),
        ({"engines": 2}, CPU._replace(free=83 * GB), "ok", "1 rank and 2 engines"),
        ({"engines": 2, "address": "auto"}, CPU._replace(free=82 * GB), "ok", "1 rank and 2 engines"),
        ({"trainers": 4}, CPU._replace(free=95 * GB), "warning", "rank 0, ranks 1-3: 96.00 GB together"),
        ({"trainers": 4}, CPU._replace(free=26 * GB), "problem", "rank 0: 27.00 GB, and 26.00 GB"),
        ({"trainers": 4}, CUDA._replace(free=27 * GB), "ok", "4 ranks"),
        ({"trainers": 4}, CUDA._replace(free=26 * GB), "problem", "rank 0: 27.00 GB, and 26.00 GB"),
        ({"trainers": 9}, CUDA, "warning", "cluster.trainers = 9: with 0 devices for engines"),
        ({"engines": 8}, CUDA, "problem", "cluster.engines = 8: 8 CUDA devices for engines and one for rank 0"),
        ({"engines": 7}, CUDA, "ok", "1 rank and 7 engines"),
        ({"engines": 8, "address": "auto"}, CUDA, "ok", "1 rank and 8 engines"),
        ({"engines": 1, "engine": "vllm", "memory": "4 GB"}, CUDA, "problem", "engine.memory = '4 GB': vLLM's weights"),
        ({"engines": 1, "engine": "vllm", "memory": "90 GB"}, CUDA, "problem", "engine 0: 90.00 GB on each device"),
        ({"engines": 1}, CPU._replace(shared=9 * GB), "warning", "Ray's object store needs 10.00 GB in /dev/shm"),
        ({"engines": 1}, CPU._replace(shared=None), "ok", "1 rank and 1 engine:"),
        ({"engines": 1, "address": "auto"}, CPU._replace(shared=9 * GB), "ok", "1 rank and 1 engine:"),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], machine: Machine, severity: str, words: str) -> None:
    chosen = cluster(**settings)
    (found,) = check_placement(chosen, placed(chosen, machine), machine)
    assert (found.severity, words in found.what) == (severity, True), found.what
    assert found.figures
    assert severity == "ok" or (found.why and found.change)


def test_ray_starts_no_store_above_10_gb_elsewhere() -> None:
    chosen = cluster(engines=1)
    found = place_processes(chosen, MEMORY, SENT + 1, CPU)
    assert found is not None
    (finding,) = check_placement(chosen, found, CPU._replace(shared=9 * GB))
    assert (finding.severity, finding.why) == ("problem", "Ray does not start")


def test_weights_are_counted_as_engines_get_them(tiny_folder: str) -> None:
    """With the native engine, matmuls in the compute dtype and the rest in float32; with vLLM, all in the first."""
    policy = load_model(find_model(tiny_folder), "cpu", "bfloat16")
    count = sum(weight.numel() for weight in policy.model.parameters())
    products = sum(weight.numel() for layer in policy.layers for weight in layer.parameters() if weight.ndim == 2)
    assert measure_sent(cluster(engines=1, engine="vllm"), policy) == 2 * count
    # The output head is the embedding, which stays float32.
    assert measure_sent(cluster(engines=1), policy) == 4 * count - 2 * products


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measure_machine(torch.device("cpu"))
    assert found.devices == 0
    assert 0 < found.free <= found.total
    assert found.rate > 0
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path / "nothing")
    assert measure_machine(torch.device("cpu")).shared is None


@pytest.fixture
def data(tiny_folder: str, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {**recipe(tiny_folder), "task": {"name": str(rows)}}


def test_a_check_shows_ranks(data: dict[str, Any]) -> None:
    found = check_recipe(data, overrides=["cluster.trainers=2"], quick=True)
    lines = describe_check(found).splitlines()
    assert max(map(len, lines)) <= 80
    place = lines.index("Placement, in GB of each process on each of its devices")
    shown = " ".join(" ".join(lines[place : lines.index("", place)]).split())
    assert "rank 0" in shown
    assert "rank 1" in shown
    assert "Ray" not in shown
    assert "which is the rate of this machine's memory and not of a network" in shown
    assert found.placement is not None
    assert found.as_dict()["placement"]["members"][1]["bytes"] == found.placement.members[1].bytes > 0
    json.dumps(found.as_dict())
    assert [each.severity for each in found.findings if each.subject == "placement"] == ["ok"]


def test_a_check_shows_engines_and_starts_no_ray(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.engines.check_ray", lambda *_: None)  # which demands that Ray is installed
    found = check_recipe(data, overrides=["cluster.engines=2"], quick=True)
    assert "Ray" in describe_check(found)
    assert "ray" not in sys.modules
    assert found.placement is not None
    assert [member.name for member in found.placement.members] == ["rank 0", "engines 0-1"]


def test_a_check_of_a_single_process_has_none(data: dict[str, Any]) -> None:
    found = check_recipe(data, quick=True)
    assert found.placement is None
    assert found.as_dict()["placement"] is None
    assert "Placement" not in describe_check(found)
