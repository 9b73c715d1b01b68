"""vLLM's tests need an environment with vLLM: `make test-vllm`. Each kind of model is one start of vLLM a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines.completions import CompletionText
from gruppo.engines.vllm.engine import VllmEngine
from gruppo.models.policy import LanguageModel
from gruppo.utils.imports import installed
from tests.engines.test_contract import make_policy

if not installed("vllm"):
    collect_ignore_glob = ["test_*.py"]

SLOTS = 256
Start = Callable[..., VllmEngine]


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """An engine of a policy: a new one for the first policy of a kind, and the same one with the policy's weights and
    tokenizer later."""
    started: dict[tuple[int, torch.dtype], VllmEngine] = {}

    def find(policy: LanguageModel, slots: int = 64) -> VllmEngine:
        kind = policy.head_size, policy.dtype
        if kind not in started:
            started[kind] = VllmEngine(policy, SLOTS, policy.context, EngineTable(name="vllm"))
        engine = started[kind]
        engine.slots, engine.text = min(slots, SLOTS), CompletionText(policy.tokenizer, policy.eos_ids)
        engine.load_weights(policy.weight_source(), 0)
        return engine

    yield find
    for engine in started.values():
        engine.close()


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    return make_policy()
