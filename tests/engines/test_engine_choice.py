"""What `engine.name` chooses, and what is refused before any weights are loaded. vLLM itself is not needed here."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.config.loading import load_recipe
from gruppo.engines import ENGINES, build_engine, check_engine
from gruppo.engines.base import Engine
from gruppo.engines.native.engine import NativeEngine
from gruppo.engines.vllm import launch
from gruppo.engines.vllm.launch import Size, options
from gruppo.errors import UsageError
from gruppo.evaluation.runner import evaluate
from gruppo.models.policy import LanguageModel
from gruppo.training.memory_estimate import Workload
from tests.conftest import make_policy

CPU = torch.device("cpu")


def recipe(engine: dict[str, Any] | None = None, **tables: Any) -> Any:
    return load_recipe({"model": {"name": "m"}, "engine": {"name": "vllm", **(engine or {})}, **tables})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.machinery.ModuleSpec("vllm", None, origin="vllm.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"engine": {"name": "vlm"}},
            'must be "native", "vllm" or an import path such as "my_engine.py:MyEngine"; did you mean "vllm"',
        ),
        ({"engine": {"memory": "4 GB"}}, 'engine.memory = "4 GB": has no effect: only engine.name = "vllm" uses it'),
        ({"engine": {"device": 1}}, "engine.device = 1: has no effect"),
        ({"engine": {"name": "vllm", "memory": 1.5}}, "engine.memory = 1.5: must be a fraction"),
        ({"engine": {"name": "vllm", "device": -1}}, "engine.device = -1"),
        (
            {"engine": {"name": "vllm"}, "method": {"name": "sft"}, "task": {"name": "arithmetic", "completion": "x"}},
            'engine.name = "vllm": has no effect: method.source = "dataset" samples nothing',
        ),
    ],
)
def test_recipes_that_are_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe({"model": {"name": "m"}, **tables})
    assert message in str(caught.value)


def test_a_missing_vllm_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'vLLM is not installed; run: pip install "gruppo\[vllm\]"'):
        check_engine(recipe(), CPU, torch.float32)


@pytest.mark.parametrize(
    ("settings", "device", "dtype", "message"),
    [
        (recipe, "mps", torch.float32, "vLLM does not run on mps"),
        (recipe, "cpu", torch.float64, 'model.dtype = "float64": vLLM computes in float32 or bfloat16 only'),
        (lambda: recipe({"device": 1}), "cpu", torch.float32, "engine.device = 1: is a CUDA device"),
        (lambda: recipe({"device": 64}), "cuda", torch.float32, "engine.device = 64: there are"),
        (lambda: recipe(sampling={"temperature": 0.001}), "cpu", torch.float32,
         "sampling.temperature = 0.001: vLLM samples at 0.01 or more"),
        (lambda: recipe(evaluation={"decoding": {"temperature": 0.5, "min_p": 0.1, "top_p": 0.9}}), "cpu",
         torch.float32, "evaluation.decoding.min_p = 0.1: vLLM applies min_p before top_p"),
        (lambda: recipe(benchmarks=[{"task": "gsm8k", "decoding": {"temperature": 0.002}}]), "cpu", torch.float32,
         r"benchmarks\[0\].decoding.temperature = 0.002"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("installed")
def test_what_vllm_cannot_do_is_refused(
    settings: Callable[[], Any], device: str, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_engine(settings(), torch.device(device), dtype)


@pytest.mark.usefixtures("installed")
def test_the_device_of_the_trainer_is_shared_by_leaving_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    with pytest.raises(UsageError, match=r"engine\.device = 2: is the device of the trained model; leave it out to"):
        check_engine(recipe({"device": 2}), torch.device("cuda"), torch.float32)
    with pytest.raises(UsageError, match=r"engine\.device = 1: is the device of the trained model"):
        check_engine(recipe({"device": 1}), torch.device("cuda:1"), torch.float32)
    check_engine(recipe({"device": 1}), torch.device("cuda"), torch.float32)


@pytest.mark.usefixtures("installed")
def test_what_vllm_can_do_is_accepted() -> None:
    greedy = {"decoding": {"min_p": 0.1, "top_p": 0.9}}  # without a temperature they do nothing
    check_engine(recipe(evaluation=greedy, sampling={"temperature": 0.01}), CPU, torch.bfloat16)
    check_engine(load_recipe({"model": {"name": "m"}}), CPU, torch.float64)


def test_commands_refuse_before_they_load_weights(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("gruppo.models.loading.load_weights", never)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'^engine = "vllm": vLLM is not installed'):
        evaluate(tiny_folder, engine="vllm", progress=False)


def test_the_engine_of_an_import_path_samples_in_evaluation(tiny_folder: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from gruppo.engines.native.engine import NativeEngine\n\n\n"
        "class Mine(NativeEngine):\n"
        "    def generate(self, requests, params, advance=None):\n"
        "        raise RuntimeError('my engine samples')\n"
    )
    with pytest.raises(RuntimeError, match="my engine samples"):
        evaluate(tiny_folder, engine=f"{tmp_path / 'mine.py'}:Mine", questions=2, max_tokens=3, progress=False)


class Half:
    """Samples, and that is all."""

    def stream(self, requests: object, params: object, advance: object = None) -> None: ...


class Inherits(Engine):
    """Has nothing of its own."""


def factory(policy: object, slots: int) -> None: ...


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("Half", "has no method load_weights and no method generate and no method sleep and no method close; write a"),
        ("Inherits", "has no method stream and no method load_weights; write a class with stream, load_weights, "),
        ("factory", "has no method stream and no method load_weights and"),
    ],
)
def test_what_is_no_engine_is_refused_by_the_methods_that_it_lacks(name: str, missing: str) -> None:
    with pytest.raises(UsageError, match=f'engine.name = "{__name__}:{name}": {missing}'):
        check_engine(recipe({"name": f"{__name__}:{name}"}), CPU, torch.float32)


class Elsewhere(NativeEngine):
    """In place of vLLM: an engine with weights of its own that is told how long its sequences are."""

    copies_weights = True

    def __init__(self, policy: LanguageModel, slots: int, length: int, settings: EngineTable, devices: int) -> None:
        super().__init__(make_policy(seed=99, max_position_embeddings=512), slots)
        self.length, self.settings = length, settings


@pytest.mark.parametrize(("context", "length", "expected"), [(512, 300, 300), (512, 20, 112), (100, 300, 100)])
def test_vllm_is_started_for_the_longest_sequence_and_the_probe(
    monkeypatch: pytest.MonkeyPatch, context: int, length: int, expected: int
) -> None:
    monkeypatch.setitem(ENGINES, "vllm", f"{__name__}:Elsewhere")
    settings = EngineTable(name="vllm", memory="1 GB")
    engine: Any = build_engine(make_policy(max_position_embeddings=context), 4, settings=settings, length=length)
    assert (engine.engine.length, engine.engine.settings) == (expected, settings)


def test_vllm_gets_memory_for_its_slots_and_no_more(tmp_path: Path) -> None:
    """On a CPU: keys and values of each slot, with two blocks to spare, beside the weights and their packed copy."""
    policy = make_policy()
    weights = 2 * 4 * sum(parameter.numel() for parameter in policy.model.parameters())
    sequence = policy.cache_bytes * (100 + 64)

    def cache(memory: str, slots: int = 8) -> int:
        found: int = options(tmp_path, policy, EngineTable(name="vllm", memory=memory), Size(slots, 100))[
            "kv_cache_memory_bytes"
        ]
        return found

    assert cache("1 GB") == 8 * sequence
    assert cache(f"{weights + 3 * sequence} B") == 3 * sequence
    with pytest.raises(UsageError, match=r"engine.memory = '\d+ B': allows 0.00 GB, and vLLM needs at least"):
        cache(f"{weights + sequence - 1} B")


def test_memory_of_vllm_is_counted_in_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the native engine keeps float32 keys and values on a CPU, vLLM bfloat16. A 4-bit weight is sent
    whole. A fraction is one of what the process may use."""
    settings, size = EngineTable(name="vllm", memory=0.5), Size(1, 100)
    wide, narrow = make_policy(), make_policy(torch.bfloat16)
    found = [options(tmp_path, policy, settings, size)["kv_cache_memory_bytes"] for policy in (wide, narrow)]
    assert found == [wide.cache_bytes * 164, wide.cache_bytes * 164 / 2]

    weight = wide.model.model.layers[0].mlp.up_proj.weight
    count = sum(parameter.numel() for parameter in wide.model.parameters())
    weight.quant_state = SimpleNamespace(shape=torch.Size([8 * weight.shape[0], weight.shape[1]]))
    needed = 2 * 4 * (count + 7 * weight.numel())
    monkeypatch.setattr(launch, "machine_memory", lambda: 2 * (needed + found[0]))
    assert options(tmp_path, wide, settings, size)["kv_cache_memory_bytes"] == found[0]
    monkeypatch.setattr(launch, "machine_memory", lambda: 2 * (needed + found[0]) - 2)
    with pytest.raises(UsageError, match=r"engine.memory = 0\.5: allows"):
        options(tmp_path, wide, settings, size)


def test_a_sampler_elsewhere_needs_no_memory_here() -> None:
    from dataclasses import replace

    from gruppo.models.footprint import measure_footprint
    from gruppo.training.memory_estimate import forecast_memory
    from gruppo.utils.progress import NullProgress

    work = Workload(prompt_tokens=20, max_tokens=30, prompts_per_step=4, group_size=4)
    footprint = measure_footprint(make_policy(), 10**8, NullProgress())
    here, elsewhere = (
        forecast_memory(footprint, replace(work, samples_elsewhere=there), 256, 16) for there in (False, True)
    )
    assert here.cache > 0 < here.work
    assert (elsewhere.cache, elsewhere.work) == (0, 0)
    assert elsewhere.training == here.training
    assert work.longest == 50
    assert replace(work, turns=True).longest == 80


class InPlace(NativeEngine):
    """A user's engine that samples with the trained model itself."""


def test_what_cannot_sample_while_the_model_is_trained(installed: None) -> None:
    lagged = {"cluster": {"lag": 1}, "method": {"tis_cap": 2.0}}
    shared = recipe(**lagged)
    with pytest.raises(UsageError, match=r'cluster.lag = 1: engine.name = "vllm" shares the device .* engine.device'):
        check_engine(shared, torch.device("cuda"), torch.bfloat16)
    in_place = recipe({"name": "tests/engines/test_engine_choice.py:InPlace"}, **lagged)
    with pytest.raises(UsageError, match=r"cluster.lag = 1: .*InPlace.* samples with the trained model itself"):
        check_engine(in_place, CPU, torch.float32)
    check_engine(recipe({"name": "native"}, **lagged), CPU, torch.float32)
    check_engine(recipe({"name": "tests/engines/test_engine_choice.py:InPlace"}), CPU, torch.float32)


TWO = {"cluster": {"engines": 2}}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({**TWO, "method": {"name": "rft"}}, 'method.source = "initial": not supported with engines'),
        ({**TWO, "model": {"name": "m", "lora": {"base": "4bit"}}}, 'model.lora.base = "4bit": not supported'),
        ({**TWO, "model": {"name": "m", "trust_remote_code": True}}, "cluster.engines = 2: does not run Python files"),
        ({"cluster": {"engines": 2, "engine_devices": 4}}, 'engine.name = "native" computes on one device'),
        ({"cluster": {"address": "auto"}}, "cluster.trainers = 1, engines = 0 and reward_hosts = 0 start nothing"),
        ({"cluster": {"weights": "files"}}, "cluster.engines = 0 starts no engines"),
        ({**TWO, "engine": {"name": "vllm", "device": 1}}, "engine.device = 1: has no effect: Ray gives each"),
        ({"cluster": {"shards": 1}}, "cluster.shards = 1: has no effect: a single trainer"),
        ({"cluster": {"weights": "transfer"}}, "cluster.weights = 'transfer': must be 'objects' or 'files'"),
        (
            {**TWO, "method": {"name": "sft"}, "task": {"name": "arithmetic", "completion": "x"}},
            'cluster.engines = 2: has no effect: method.source = "dataset" samples nothing',
        ),
    ],
)
def test_fleets_that_are_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe({"model": {"name": "m"}, **tables})
    assert message in str(caught.value)


def test_a_fleet_needs_ray_a_device_that_ray_knows_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    two = load_recipe({"model": {"name": "m"}, **TWO})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'Ray is not installed; run: pip install "gruppo\[cluster\]"'):
        check_engine(two, CPU, torch.float32)
    found = importlib.machinery.ModuleSpec("ray", None, origin="ray.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    check_engine(two, CPU, torch.float32)
    with pytest.raises(UsageError, match="Ray has no devices of type mps"):
        check_engine(two, torch.device("mps"), torch.float32)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UsageError, match="needs 2 CUDA devices besides the leader's, and this machine has 1"):
        check_engine(two, torch.device("cuda"), torch.float32)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    check_engine(two, torch.device("cuda"), torch.float32)
    elsewhere = load_recipe({"model": {"name": "m"}, "cluster": {"engines": 2, "address": "10.0.0.1:6379"}})
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UsageError, match=r'cluster.address = "10.0.0.1:6379": .* RAY_AUTH_MODE=token'):
        check_engine(elsewhere, CPU, torch.float32)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_engine(elsewhere, CPU, torch.float32)
