"""Training on a device without float64, such as mps. "meta" stands for it: it computes shapes, devices and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.config.method_section import Method
from gruppo.errors import UsageError
from gruppo.models.logprobs import OutputHead, token_logprobs
from gruppo.models.packing import Batch, pack
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_dtype
from gruppo.training.policy_loss import batch_loss
from gruppo.utils.metrics import Metrics
from gruppo.utils.transfer import real_dtype
from tests.conftest import make_policy, random_groups
from tests.training.test_invariance import prepared

META = torch.device("meta")


class Refusing(TorchDispatchMode):
    """Refuses float64 tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device == META and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
        return result


@pytest.fixture(autouse=True)
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.models.packing.real_dtype", lambda device: torch.float32)


METHODS = {
    "grpo": Method(kl_coef=0.05),
    "truncated importance sampling": Method(kl_coef=0.0, tis_cap=2.0),
    "gspo": Method(kl_coef=0.0, ratio="sequence"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_and_its_gradient_have_no_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hidden states of the decoder on; autocast does not know "meta", so the decoder cannot compute there."""
    policy, weight = make_policy(), torch.zeros(48, 32, device=META, requires_grad=True)

    def score(_: LanguageModel, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.zeros(len(batch.token_ids), 32, device=META).index_select(0, batch.predictors)
        return token_logprobs(hidden, OutputHead(weight), batch.targets, temperature)

    monkeypatch.setattr("gruppo.training.policy_loss.score", score)
    with Refusing():
        for batch in pack(prepared(random_groups(groups=3)), sequence_mean_weights, 40, with_kl=True, device=META):
            batch_loss(policy, policy, batch, METHODS[name], 0.8, Metrics()).backward()
    assert weight.grad is not None
    assert weight.grad.device == META


def test_a_float64_tensor_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.models.packing.real_dtype", lambda device: torch.float64)
    with pytest.raises(TypeError, match="no float64"), Refusing():
        pack(prepared(random_groups(groups=1)), sequence_mean_weights, 40, with_kl=True, device=META)


def test_mps_is_the_device_without_float64() -> None:
    assert [real_dtype(name) for name in ("cpu", "cuda", "mps")] == [torch.float64, torch.float64, torch.float32]
    with pytest.raises(UsageError, match=r'model\.dtype = "float64": mps has no float64; write model\.device = "cpu"'):
        choose_dtype("float64", torch.device("mps"))
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
