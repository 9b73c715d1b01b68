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
    columns: Sequence[Sequence[float] | np.ndarray], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """A vector on the device for each column, in one transfer, which the host does not wait for."""
    buffer = torch.cat([torch.tensor(column, dtype=dtype) for column in columns])
    if torch.device(device).type == "cuda":
        buffer = buffer.pin_memory()
    copied = buffer.to(device, non_blocking=True)
    return torch.split(copied, [len(column) for column in columns])


def real_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (mps)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
