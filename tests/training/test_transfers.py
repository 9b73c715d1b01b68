"""Training waits for a device once per update, and sends each micro-batch to it in two transfers.

On an accelerator a read of one number waits until everything before it is computed. On the CPU the same operations are
called, so they can be counted here.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.config.method_section import Critic, Method
from gruppo.config.sections import Optimizer
from gruppo.errors import RunError
from gruppo.models.packing import Batch, pack
from gruppo.models.value_head import ScalarModel
from gruppo.training.nonfinite import not_finite
from gruppo.training.optimizer import make_optimizer, update
from gruppo.training.policy_loss import batch_loss
from gruppo.training.value_model import critic_loss
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.transfer import as_floats
from tests.conftest import make_group, make_policy, random_groups
from tests.training.test_invariance import prepared

# Operations whose result the host has to wait for: a scalar that is read, and results of a size that depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}


class Calls(TorchDispatchMode):
    """Names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in {"index", "index_put_"} and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            name = "nonzero"
        self.names.append(name)
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        return [name for name in self.names if name in WAITING]


def test_calls_that_wait_are_seen() -> None:
    with Calls() as calls:
        float(torch.ones(2)[torch.tensor([True, False])].sum())
    assert calls.waits == ["nonzero", "_local_scalar_dense"]


METHODS = {
    "grpo": Method(kl_coef=0.05),
    "grpo with truncated importance sampling": Method(kl_coef=0.0, tis_cap=2.0),
    "gspo": Method(kl_coef=0.0, ratio="sequence"),
    "cispo": Method(kl_coef=0.0, surrogate="clipped-weight"),
}


def even_groups(count: int) -> list[Group]:
    """Groups whose completions are equally long: attention plans padding on the host, which is not what is tested."""
    return prepared(random_groups(groups=count, uneven=False))


def never(value: float, what: str, batches: Any) -> None:
    assert math.isfinite(value), what


@pytest.mark.parametrize("name", METHODS)
def test_an_update_waits_for_the_device_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, settings, metrics = make_policy(), METHODS[name], Metrics()
    optimizer = make_optimizer(Optimizer(), policy.model, policy)
    batches = pack(even_groups(4), sequence_mean_weights, 40, with_kl=True)
    assert len(batches) > 2
    transfers: list[int] = []

    def counted(scalars: Any) -> list[float]:
        transfers.append(len(scalars))
        return as_floats(scalars)

    for module in ("gruppo.training.optimizer", "gruppo.utils.transfer"):
        monkeypatch.setattr(f"{module}.as_floats", counted)

    def loss_of(batch: Batch) -> torch.Tensor:
        return batch_loss(policy, reference, batch, settings, 0.8, metrics)

    reference = policy.frozen_copy()
    with Calls() as calls:
        update(batches, loss_of, policy, policy.model, optimizer, 1e-3, 1.0, never, lambda _: None)
    assert calls.waits == []
    assert transfers == [len(batches) + 1], "the losses and the norm, together"
    reduced = metrics.reduce()
    assert len(transfers) == 2, "all metrics, together"
    assert reduced["policy/ratio_max"] == pytest.approx(1, abs=1e-5)


def test_the_value_model_does_not_wait_either() -> None:
    policy = make_policy()
    critic, metrics = ScalarModel.on(policy), Metrics()
    groups = even_groups(2)
    for group in groups:
        group.returns = [[0.5] * len(completion.token_ids) for completion in group.completions]
        group.values = [[0.25] * (len(completion.token_ids) + 1) for completion in group.completions]
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    with Calls() as calls:
        critic_loss(critic, batch, Critic(), metrics).backward()
    assert calls.waits == []
    reduced = metrics.reduce()
    assert reduced["value/return_mean"] == pytest.approx(0.5)
    assert reduced["value/error"] == pytest.approx(0.25)


def test_the_first_micro_batch_that_is_not_finite_is_named() -> None:
    """Losses are read after all micro-batches, and each still belongs to its own."""
    policy = make_policy()
    before = [weight.detach().clone() for weight in policy.model.parameters()]
    optimizer = make_optimizer(Optimizer(), policy.model, policy)
    batches = pack(prepared(random_groups(groups=4)), sequence_mean_weights, 40, with_kl=True)
    broken = batches[1:]
    named: list[tuple[str, list[Batch]]] = []

    def loss_of(batch: Batch) -> torch.Tensor:
        loss = batch_loss(policy, None, batch, Method(kl_coef=0.0), 0.8, Metrics())
        return loss * float("nan") if any(batch is other for other in broken) else loss

    def require(value: float, what: str, checked: Any) -> None:
        if not math.isfinite(value):
            named.append((what, list(checked)))
            raise RunError(what)

    with pytest.raises(RunError):
        update(batches, loss_of, policy, policy.model, optimizer, 1e-3, 1.0, require, lambda _: None)
    ((what, (batch,)),) = named
    assert what == "loss"
    assert batch is batches[1]
    assert all(torch.equal(old, new) for old, new in zip(before, policy.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in policy.model.parameters())


@pytest.mark.parametrize("with_values", [False, True])
def test_a_micro_batch_is_sent_in_two_transfers(with_values: bool) -> None:
    """ "meta" stands for an accelerator."""
    groups = prepared(random_groups(groups=3))
    if with_values:
        for group in groups:
            group.returns = [[0.5] * len(completion.token_ids) for completion in group.completions]
            group.values = [[0.25] * (len(completion.token_ids) + 1) for completion in group.completions]
    with Calls() as calls:
        batches = pack(groups, sequence_mean_weights, 40, with_kl=True, device="meta")
    assert len(batches) > 1
    assert calls.names.count("_to_copy") == 2 * len(batches)
    on_cpu = pack(groups, sequence_mean_weights, 40, with_kl=True)
    for batch, other in zip(batches, on_cpu, strict=True):
        for name in Batch.__slots__:
            mine, its = getattr(batch, name), getattr(other, name)
            if isinstance(its, torch.Tensor):
                assert (mine.device.type, mine.shape, mine.dtype) == ("meta", its.shape, its.dtype), name
            else:
                assert mine == its


def test_reals_are_float32_where_a_device_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.models.packing.real_dtype", lambda device: torch.float32)
    (batch,) = pack(prepared(random_groups(groups=1)), sequence_mean_weights, 10**9, with_kl=True)
    reals = [getattr(batch, name) for name in Batch.__slots__]
    dtypes = {tensor.dtype for tensor in reals if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()}
    assert dtypes == {torch.float32}


def test_tokens_and_completions_of_a_batch() -> None:
    group = make_group([1, 2], [[3, 4, 5], [6, 7]], [0.0, 1.0])
    group.completions[0] = group.completions[0].__class__((3, 4, 5), (-1.0,) * 3, (True, False, True), "stop", 0, "")
    (batch,) = pack(prepared([group]), sequence_mean_weights, 10**9, with_kl=True)
    assert batch.sequences.tolist() == [0, 0, 0, 1, 1]
    assert batch.trained.tolist() == [0, 2, 3, 4] == (batch.weights != 0).nonzero()[:, 0].tolist()
    assert not_finite(batch) == {}


def test_values_are_read_without_rounding() -> None:
    values = [torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1), torch.tensor(7), torch.tensor(True)]
    assert as_floats(values) == [0.1, float(torch.tensor(0.1)), 7.0, 1.0]
    assert as_floats([]) == []


def test_metrics_of_tensors_are_those_of_numbers() -> None:
    numbers, tensors, mixed = Metrics(), Metrics(), Metrics()
    for place, value in enumerate([0.1, 0.7, -2.5, 3.5]):
        for metrics, observed in (
            (numbers, value),
            (tensors, torch.tensor(value, dtype=torch.float64)),
            (mixed, value if place % 2 else torch.tensor(value, dtype=torch.float64)),
        ):
            metrics.mean("mean", observed, 2)
            metrics.maximum("max", observed)
            metrics.minimum("min", observed)
    assert numbers.reduce() == tensors.reduce() == mixed.reduce()
    assert numbers.reduce() == {"max": 3.5, "mean": (0.1 + 0.7 - 2.5 + 3.5) / 8, "min": -2.5}
    with suppress(MemoryError), tensors.all_or_nothing():
        tensors.maximum("max", torch.tensor(9.0))
        tensors.mean("mean", torch.tensor(9.0))
        raise MemoryError
    assert tensors.reduce() == numbers.reduce()
