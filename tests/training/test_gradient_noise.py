"""The noise of the gradient: what it is by hand, what halves say about it, and that measuring it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gruppo.algorithms.aggregation import group_token_mean_weights, token_mean_weights
from gruppo.config.loading import load_recipe
from gruppo.models.packing import pack
from gruppo.rollout.source import Step
from gruppo.training import gradient_noise
from gruppo.training.gradient_noise import HalfGradient, Halves, noise_of, sampled_gradient, split_in_halves
from gruppo.training.policy_trainer import PolicyTrainer
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy, random_groups
from tests.small_runs import fingerprint
from tests.training.test_invariance import prepared

CHANGES: list[dict[str, Any]] = [
    {"method__minibatches": 2, "method__inner_updates": 2},
    {"method__name": "dpo", "method__kl_coef": 0.0, "method__success_threshold": 0.3},
    {"method__old_logprobs": "engine", "model__lora": {"rank": 2}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_run_is_the_same_bit_for_bit_with_and_without(trained: Callable[..., Path], changes: dict[str, Any]) -> None:
    found = fingerprint(trained(**changes, run__steps=2, run__noise_every=1))
    without = fingerprint(trained(**changes, run__steps=2, run__noise_every=0))
    lines = found.pop("metrics")
    assert all(-1 <= line["gradient/agreement"] <= 1 for line in lines)
    rest = [{name: value for name, value in line.items() if not name.startswith("gradient/")} for line in lines]
    assert rest == without.pop("metrics")
    assert found == without


def trainer_of(groups: list[Group], **method: Any) -> tuple[PolicyTrainer, Any, Step]:
    policy = make_policy(torch.float64)
    recipe = load_recipe({
        "model": {"name": "x", "dtype": "float64"}, "run": {"noise_every": 2}, "method": {"kl_coef": 0.0, **method},
        "reward": {"functions": ["numeric_answer"]}, "optimizer": {"learning_rate": 0.0},
    })  # fmt: skip
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    trainer = PolicyTrainer(policy, None, optimizer, recipe, BatchSizes(30, 4), Guard(), NullProgress())  # type: ignore[arg-type]
    step = Step(2, 0)
    return trainer, trainer.pack(groups, step), step


class Guard:
    def require(self, value: float, *_: Any) -> None:
        assert np.isfinite(value)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "group-token-mean"])
def test_halves_are_those_of_torch(aggregation: str) -> None:
    """The gradient of each half alone, with the token weights of the whole step, computed group by group."""
    groups = prepared(random_groups(groups=5))
    trainer, (minibatch,), step = trainer_of(groups, aggregation=aggregation)
    halves = split_in_halves(groups, None, minibatch.weights, step.number)
    assert halves is not None
    assert (halves.first, halves.second, halves.completions) == (2, 3, 20)
    gradients = [gradient_of(trainer, groups, minibatch.weights, place) for place in range(5)]
    first = sum(gradient for gradient, numbers in zip(gradients, halves.part, strict=True) if numbers)
    second = sum(gradient for gradient, numbers in zip(gradients, halves.part, strict=True) if not numbers)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    trainer.update(minibatch, 0, step)
    found = step.metrics.reduce()
    agreement = float(first @ second / (first.norm() * second.norm()))
    signal = float(25 / 6 * (first @ second) / ((first + second) @ (first + second)))
    assert found["gradient/agreement"] == pytest.approx(agreement, rel=1e-9)
    assert found["gradient/signal"] == pytest.approx(signal, rel=1e-9)
    assert found["optimizer/gradient_norm"] == pytest.approx(float((first + second).norm()), rel=1e-9)
    if signal > 0:
        assert found["gradient/noise_scale"] == pytest.approx(20 * (1 - signal) / signal, rel=1e-9)


def gradient_of(trainer: PolicyTrainer, groups: list[Group], weights: Any, chosen: int) -> Tensor:
    """The part of the step's gradient that comes from one group."""
    policy = trainer.policy
    for batch in pack(groups, weights, 10**9, False):
        starts = np.cumsum([0, *(length for _, _, length in batch.members)])
        for (index, _, length), start in zip(batch.members, starts, strict=False):
            if index != chosen:
                batch.weights[start : start + length] = 0
        with policy.precision():
            trainer._loss(trainer.pack(groups, Step(1, 0))[0], Step(1, 0), Metrics())(batch).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])  # type: ignore[union-attr]
    policy.model.zero_grad(set_to_none=True)
    return gradient.clone()


def test_the_halves_depend_on_the_step_alone() -> None:
    groups = prepared(random_groups(groups=6))
    parts = [split_in_halves(groups, None, token_mean_weights, step) for step in (1, 1, 2, 3, 4)]
    assert all(found is not None and found.first == 3 for found in parts)
    assert parts[0].part == parts[1].part  # type: ignore[union-attr]
    assert len({str(found.part) for found in parts}) > 2  # type: ignore[union-attr]
    groups[0].trained = [False] * 4
    found = split_in_halves(groups, None, group_token_mean_weights, 1)
    assert found is not None
    assert (found.first, found.second, found.completions) == (2, 3, 20)
    assert found.part[0] == []
    assert split_in_halves(groups[:2], None, token_mean_weights, 1) is None


class Vector(nn.Module):
    """A parameter whose gradient is set."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def measured(signal: float, noise: float, groups: int, times: int = 100, size: int = 2000) -> dict[str, float]:
    """Mean agreement and signal of gradients of groups with this expected norm and spread, of one completion each."""
    rng, found = np.random.default_rng(0), []
    direction = np.full(size, 1 / size**0.5)
    half = groups // 2
    for _ in range(times):
        each = signal * direction + rng.normal(0, noise / size**0.5, (groups, size))
        module = Vector(size)
        module.weight.grad = torch.tensor(each[:half].sum(axis=0))
        first = HalfGradient(module, Halves([], token_mean_weights, half, groups - half, groups))
        module.weight.grad = torch.tensor(each.sum(axis=0))
        metrics = Metrics()
        first.compare(metrics)
        found.append(metrics.reduce())
    return {name: float(np.mean([line[name] for line in found])) for name in ("gradient/agreement", "gradient/signal")}  # type: ignore[misc]


@pytest.mark.parametrize("groups", [8, 9])
def test_signal_far_above_noise_and_far_below_it(groups: int) -> None:
    clear = measured(1.0, 0.1, groups)
    assert clear["gradient/agreement"] > 0.99
    assert clear["gradient/signal"] == pytest.approx(1 / (1 + 0.01 / groups), abs=1e-3)
    lost = measured(0.01, 1.0, groups)
    assert abs(lost["gradient/agreement"]) < 0.03
    assert abs(lost["gradient/signal"]) < 0.03
    even = measured(1.0, groups**0.5, groups)
    assert even["gradient/signal"] == pytest.approx(0.5, abs=0.06), "as much noise as signal: the noise scale"


def test_the_noise_scale_by_hand() -> None:
    """a = (3, 0), b = (1, 2): a·b = 3, |G|² = 20; the signal is 4·3/20, and the noise |a - b|² = 8 of 20."""
    found = noise_of([9.0, 3.0, 5.0], Halves([], token_mean_weights, 2, 2, 16))
    assert found is not None
    assert found.signal == pytest.approx(12 / 20)
    assert found.scale == pytest.approx(16 * 8 / 12)
    assert found.agreement == pytest.approx(3 / 45**0.5)
    opposite = noise_of([1.0, -0.5, 1.0], Halves([], token_mean_weights, 2, 2, 16))
    assert opposite is not None
    assert opposite.scale is None
    for products in ([0.0, 0.0, 0.0], [float("nan"), 0.0, 1.0], [float("inf"), 0.0, 1.0]):
        assert noise_of(products, Halves([], token_mean_weights, 2, 2, 16)) is None


def test_large_gradients_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(8, 100, bias=False)
    module.weight.grad = torch.arange(800.0).reshape(100, 8)
    monkeypatch.setattr(gradient_noise, "COORDINATES", 300)
    found = sampled_gradient(module)
    assert found.tolist() == list(range(0, 800, 3)), "every third; a stride of 4 would see two columns alone"
    module.weight.grad = None
    assert sampled_gradient(module).tolist() == [0.0] * 267


def test_no_memory_for_the_measurement_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = prepared(random_groups(groups=4))
    trainer, (minibatch,), step = trainer_of(groups)

    def full(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr("gruppo.training.policy_trainer.accumulate", full)
    trainer.update(minibatch, 0, step)
    found = step.metrics.reduce()
    assert "gradient/signal" not in found
    assert found["optimizer/gradient_norm"]
    assert trainer.sizes.micro_batch_tokens == 30
