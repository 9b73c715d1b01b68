"""How vLLM is used on CUDA, with a stand-in for vLLM: there is no GPU here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.vllm import engine as module
from gruppo.engines.vllm.engine import VllmEngine
from gruppo.engines.vllm.launch import Size, _environment, options
from gruppo.engines.vllm.transfer import ByTransferApi, choose_transfer
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from tests.conftest import make_policy

CUDA = torch.device("cuda")
SHARED, APART = EngineTable(name="vllm", memory=0.4), EngineTable(name="vllm", memory=0.9, device=1)


class Stand:
    """In place of `vllm.LLM`: writes down the calls. `llm_engine` samples nothing."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.llm_engine = self

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append(name)


class Sender:
    """In place of vLLM's sender: reads all weights, or fails at the first."""

    def __init__(self, transfer: ByTransferApi) -> None:
        self.transfer, self.sent, self.fails = transfer, dict[str, Tensor](), False

    def send_weights(self) -> None:
        if self.fails:
            raise RuntimeError("no connection")
        self.sent = dict(self.transfer._tensors())


@pytest.fixture
def policy() -> LanguageModel:
    return replace(make_policy(torch.bfloat16), device=CUDA)


@pytest.mark.parametrize(
    ("settings", "sleeps", "backend"), [(SHARED, True, "ipc"), (APART, False, "nccl")], ids=["shared", "apart"]
)
def test_one_device_is_shared_by_sleeping_and_another_one_is_not(
    settings: EngineTable, sleeps: bool, backend: str, policy: LanguageModel, tmp_path: Path
) -> None:
    arguments = options(tmp_path, policy, settings, Size(64, 100))
    assert arguments["gpu_memory_utilization"] == settings.memory
    assert arguments["enable_sleep_mode"] is sleeps
    assert arguments["weight_transfer_config"] == {"backend": backend}
    assert (arguments["dtype"], arguments["max_num_seqs"], arguments["max_model_len"]) == ("bfloat16", 64, 100)
    assert "kv_cache_memory_bytes" not in arguments


def test_a_size_is_a_share_of_the_memory_of_vllms_own_device(
    policy: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device 0, which trains, has 100 GB, and device 1 has 20 GB."""
    sizes = {0: 100e9, 1: 20e9}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=sizes[number]))
    for device, expected in ((None, 0.1), (1, 0.5)):
        settings = EngineTable(name="vllm", memory="10 GB", device=device)
        assert options(tmp_path, policy, settings, Size(64, 100))["gpu_memory_utilization"] == expected


def test_vllm_sees_its_device_alone_and_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    before = dict(os.environ)
    with _environment(CUDA, APART):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG", "the user's own"
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        os.environ["LD_PRELOAD"] = "vLLM sets it"
    assert dict(os.environ) == before
    with _environment(CUDA, SHARED):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert dict(os.environ) == before | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION")


@pytest.fixture
def built(policy: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> tuple[VllmEngine, Stand, Sender]:
    llm = Stand()
    monkeypatch.setattr(module, "start", lambda *arguments: llm)
    engine = VllmEngine(policy, 4, 100, SHARED)
    assert isinstance(engine._transfer, ByTransferApi)
    sender = Sender(engine._transfer)
    monkeypatch.setattr(engine._transfer, "_connect", lambda: sender)
    return engine, llm, sender


def test_a_sleeping_engine_wakes_for_weights_and_for_requests(
    built: tuple[VllmEngine, Stand, Sender], policy: LanguageModel
) -> None:
    engine, llm, _ = built
    engine.sleep()
    engine.sleep()
    assert llm.calls == ["sleep"], "once"
    engine.load_weights(policy.weight_source(), 3)
    assert llm.calls[1:] == ["wake_up", "reset_prefix_cache", "reset_prefix_cache"]
    engine.sleep()
    assert engine.generate([Request((5,), [])], SamplingParams(1.0, 4)) == [[]]
    assert llm.calls[4:] == ["sleep", "wake_up", "reset_prefix_cache"]


def test_weights_are_sent_in_the_dtype_of_vllm(built: tuple[VllmEngine, Stand, Sender], policy: LanguageModel) -> None:
    engine, _, sender = built
    counts = {"steps": torch.tensor([3])}
    engine.load_weights(WeightSource(policy.model, lambda: iter({**policy.weights(), **counts}.items())), 1)
    assert sender.sent.keys() == {*policy.weights(), "steps"}
    assert sender.sent["steps"].dtype == torch.int64
    for name, tensor in policy.weights().items():
        torch.testing.assert_close(sender.sent[name], tensor.bfloat16(), rtol=0, atol=0)


def test_a_failed_transfer_is_ended_so_that_the_next_one_can_begin(
    built: tuple[VllmEngine, Stand, Sender], policy: LanguageModel
) -> None:
    engine, llm, sender = built
    sender.fails = True
    with pytest.raises(RuntimeError, match=r"vLLM failed while loading weights \(no connection\)"):
        engine.load_weights(policy.weight_source(), 1)
    assert llm.calls == ["finish_weight_update"]
    assert engine.version == 0
    sender.fails = False
    engine.load_weights(policy.weight_source(), 2)
    assert engine.version == 2


def test_weights_go_by_name_on_a_cpu_and_by_transfer_on_cuda(policy: LanguageModel) -> None:
    names = [type(choose_transfer(Stand(), each, SHARED)).__name__ for each in (make_policy(), policy)]
    assert names == ["ByName", "ByTransferApi"]
