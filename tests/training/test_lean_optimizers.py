"""AdamW with moments in CPU memory or of 8 bits, against AdamW."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.config.sections import Optimizer
from gruppo.errors import UsageError
from gruppo.models.footprint import measure_footprint, moments_bytes
from gruppo.models.policy import LanguageModel
from gruppo.runs.folder import RunFolder
from gruppo.training.checkpoint import State, load_models, save_checkpoint, save_models
from gruppo.training.lean_optimizers import OffloadedAdamW, check_state, make_8bit
from gruppo.training.optimizer import make_optimizer
from gruppo.utils.imports import installed
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy

with_8bit = pytest.mark.skipif(not installed("bitsandbytes"), reason="needs gruppo[lean]")
STATES = ["float32", "cpu", pytest.param("8bit", marks=with_8bit)]
SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-7}


def large_policy(seed: int = 0) -> LanguageModel:
    """A policy most of whose weights are in tensors of at least 4,096 values."""
    return make_policy(seed=seed, hidden_size=64, intermediate_size=96, vocab_size=96)


def learn(policy: LanguageModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Updates on the logits of a few tokens, with another gradient at each step."""
    for step in steps:
        tokens = torch.tensor([[1 + step, 7, 3 * step % 40, 20]])
        policy.model(tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(policy: LanguageModel) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in policy.model.parameters()]


def trained(state: str, steps: int) -> tuple[LanguageModel, torch.optim.Optimizer]:
    policy = large_policy()
    optimizer = make_optimizer(Optimizer(**SETTINGS, state=state), policy.model, policy)  # type: ignore[arg-type]
    learn(policy, optimizer, range(steps))
    return policy, optimizer


def test_moments_in_cpu_memory_give_the_same_weights_bit_for_bit() -> None:
    usual, offloaded = (trained(state, 5) for state in ("float32", "cpu"))
    for one, other in zip(weights(usual[0]), weights(offloaded[0]), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(usual[0].model.parameters(), offloaded[0].model.parameters(), strict=True):
        first, second = usual[1].state[one], offloaded[1].state[other]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[kind], second[kind]) for kind in first)


def test_restored_moments_stay_in_cpu_memory() -> None:
    """ "meta" stands for an accelerator."""
    parameters = [torch.nn.Parameter(torch.zeros(4, device="meta")) for _ in range(2)]
    optimizer = OffloadedAdamW(parameters, lr=0.1, foreach=False)
    optimizer.load_state_dict(
        {
            "state": {
                number: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
                for number in range(2)
            },
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert len(tensors) == 6
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.parametrize("state", STATES)
def test_a_resume_is_exact(state: str, tmp_path: Path) -> None:
    policy, optimizer = trained(state, 3)
    run = RunFolder(tmp_path / "run")
    try:
        folder = save_checkpoint(run, partial(save_models, models={"": (policy.model, optimizer)}), State(step=3))
    finally:
        run.close()
    resumed = large_policy(seed=1)
    other = make_optimizer(Optimizer(**SETTINGS, state=state), resumed.model, resumed)  # type: ignore[arg-type]
    load_models(folder, {"": (resumed.model, other)})
    for one, two in ((policy, optimizer), (resumed, other)):
        learn(one, two, range(3, 6))
    for one, other_weight in zip(weights(policy), weights(resumed), strict=True):
        assert torch.equal(one, other_weight)


@with_8bit
def test_moments_of_8_bits_move_weights_almost_as_float32_does() -> None:
    """With the same gradients. The first update is AdamW's, because moments are rounded after it; after 20 updates the
    weights have moved by 1.4 % of the distance elsewhere. Bits were lost, so the two are not equal either."""

    def moved(make: Callable[..., torch.optim.Optimizer], updates: int) -> torch.Tensor:
        source, parameter = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.zeros(128, 256))
        optimizer = make([{"params": [parameter], "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        direction = 0.3 * torch.randn(128, 256, generator=source)
        for _ in range(updates):
            parameter.grad = 1e-3 * (torch.randn(128, 256, generator=source) + direction)
            optimizer.step()
        return parameter.detach()

    for updates, lowest, highest in ((1, 0.0, 1e-6), (20, 0.005, 0.02)):
        exact, rounded = moved(torch.optim.AdamW, updates), moved(make_8bit, updates)
        assert lowest <= float((rounded - exact).norm() / exact.norm()) < highest


def bytes_of(optimizer: torch.optim.Optimizer, kinds: set[str]) -> int:
    return sum(state[kind].nbytes for state in optimizer.state.values() for kind in kinds & state.keys())


@pytest.mark.parametrize("state", STATES)
def test_moments_are_counted(state: str) -> None:
    policy, optimizer = trained(state, 1)
    counted = moments_bytes(list(policy.model.parameters()), state, accelerator=False)
    assert counted == bytes_of(optimizer, {"exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"})
    assert measure_footprint(policy, 0, NullProgress(), state).moments == counted


def test_moments_in_cpu_memory_take_those_of_one_parameter_on_an_accelerator() -> None:
    parameters = [torch.zeros(5, 7), torch.zeros(3)]
    assert moments_bytes(parameters, "cpu", accelerator=True) == 2 * 35 * 4
    assert moments_bytes(parameters, "cpu", accelerator=False) == 2 * 38 * 4
    assert moments_bytes([torch.zeros(10_000)], "8bit", accelerator=True) == 2 * (10_000 + 40 * 4)


def test_8_bits_without_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UsageError, match=r'optimizer\.state = "8bit": needs the package bitsandbytes: pip install "gr'):
        check_state("8bit")
    check_state("cpu")
    check_state("float32")
