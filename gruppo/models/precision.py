"""Devices, dtypes, and what keeps a model from computing in float64."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from gruppo.errors import UsageError


def prepare_for_float64(model: PreTrainedModel) -> None:
    """Take out what keeps a model of float64 weights from computing in float64."""
    _widen_norms(model)
    model.set_experts_implementation("eager")  # the grouped product knows no float64


def _widen_norms(model: PreTrainedModel) -> None:
    """transformers takes RMS norms in float32, which would leave float64 proofs with float32's rounding.

    Which of the two common formulas a norm follows is seen by trying it; one that follows neither stays as it is.
    """

    def plain(norm: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, _epsilon(norm))

    def shifted(norm: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, norm.weight.shape, 1 + norm.weight, _epsilon(norm))

    norms: list[Any] = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    for module in norms:
        if _epsilon(module) is not None and hasattr(module, "weight"):
            trial = torch.linspace(-1, 2, module.weight.numel(), dtype=torch.float64, device=module.weight.device)
            with torch.no_grad():
                made = module(trial[None])
                for forward in (plain, shifted):
                    if torch.allclose(forward(module, trial[None]), made, atol=1e-5):
                        module.forward = MethodType(forward, module)
                        break


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes cuda, then mps, then cpu. Raises UsageError where it is not there."""
    if name not in {"auto", "cuda", "mps", "cpu"}:
        raise UsageError(f"device = {name!r}: unknown; write auto, cpu, cuda or mps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise UsageError(f'model.device = "{name}": this machine has none that torch can use; write "auto"')
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products; "auto" is bfloat16 where the processor has instructions for it, else float32."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name in named:
        return named[name]
    if name != "auto":
        raise UsageError(f"dtype = {name!r}: unknown; write auto, float32, bfloat16 or float64")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32
