"""Transfers between the host and a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor


def as_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors on one device, in one transfer; exact for integers below 2**24.

    Only here does training wait for a device: a `float()` of each value would wait for each.
    """
    if not scalars:
        return []
    dtype = reduce(torch.promote_types, (scalar.dtype for scalar in scalars))
    return [float(value) for value in torch.stack([scalar.detach().to(dtype) for scalar in scalars]).tolist()]


def upload(
    arrays: Sequence[Sequence[float] | np.ndarray], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Arrays, or lists of numbers, as tensors on the device, in one transfer, which the host does not wait for."""
    tensors = [torch.tensor(array, dtype=dtype) for array in arrays]
    there = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = there.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device."""
    if torch.device(device).type == "cuda":  # from other memory, the host would wait until all earlier work is done
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def real_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (mps)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
