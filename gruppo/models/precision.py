"""Devices, compute dtypes, and support for float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from gruppo.errors import UsageError


def prepare_for_float64(model: PreTrainedModel) -> None:
    """Make a model with float64 weights compute in float64."""
    _widen_norms(model)
    model.set_experts_implementation("eager")  # the grouped matmul does not support float64


def _widen_norms(model: PreTrainedModel) -> None:
    """Replace RMS norms, which transformers computes in float32, by float64 ones.

    Each norm is tried to find which of the two common formulas it follows. A norm that follows neither is not changed.
    """
    norms: list[Any] = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for module in norms:
        if _epsilon(module) is not None and hasattr(module, "weight"):
            trial = torch.linspace(-1, 2, module.weight.numel(), dtype=torch.float64, device=module.weight.device)
            with torch.no_grad():
                expected = module(trial[None])
                for forward in (_plain, _shifted):
                    if torch.allclose(forward(module, trial[None]), expected, atol=1e-5):
                        module.forward = partial(forward, module)  # unlike a method, it can be pickled
                        break


def _plain(norm: Any, hidden: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, _epsilon(norm))


def _shifted(norm: Any, hidden: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden, norm.weight.shape, 1 + norm.weight, _epsilon(norm))


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def choose_device(name: str) -> torch.device:
    """The device `name`. "auto" selects cuda, then mps, then cpu.

    Raises UsageError if it is unknown or not available.
    """
    if name not in {"auto", "cuda", "mps", "cpu"}:
        raise UsageError(f"device = {name!r}: unknown; write auto, cpu, cuda or mps")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, usable in available.items() if usable)
    if not available[name]:
        raise UsageError(f'model.device = "{name}": torch cannot use such a device on this machine; write "auto"')
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype `name`. "auto" is bfloat16 if the processor has instructions for it, else float32.

    Raises UsageError for an unknown name, and for one that the device does not have.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name == "float64" and device.type == "mps":
        raise UsageError('model.dtype = "float64": mps has no float64; write model.device = "cpu", or another dtype')
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise UsageError(f"dtype = {name!r}: unknown; write auto, float32, bfloat16 or float64")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32
