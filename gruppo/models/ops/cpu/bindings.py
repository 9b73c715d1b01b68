"""Calling the compiled kernels: types, and the check of what they can read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from gruppo.models.ops.cpu.build import library

Tensors = Sequence[Tensor | None]


def kernels_for(
    dtype: torch.dtype, *, narrow: Tensors = (), wide: Tensors = (), whole: Tensors = ()
) -> ctypes.CDLL | None:
    """The library for products in `dtype`, where what it would read lies in memory as it reads it: narrow tensors in
    that dtype, wide ones in float32, whole numbers in 64 bits. One that is None is left out."""
    for expected, tensors in ((dtype, narrow), (torch.float32, wide), (torch.int64, whole)):
        for each in tensors:
            if each is not None and (each.dtype != expected or each.device.type != "cpu" or not each.is_contiguous()):
                return None
    return library(dtype)


def new_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for a kernel to write to, whatever defaults torch is set to."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's values are, as an argument of a kernel."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def int64(number: int) -> ctypes.c_int64:
    """A size or index, as an argument of a kernel."""
    return ctypes.c_int64(number)


def thread_count() -> ctypes.c_int:
    """torch's number of threads, as an argument of a kernel."""
    return ctypes.c_int(torch.get_num_threads())


def layer_fields(**names: str) -> list[tuple[str, type]]:
    """Of a structure of kernels.c: kinds with the names of what has them, in order."""
    kinds = {"whole": ctypes.c_int64, "real": ctypes.c_float, "at": ctypes.c_void_p}
    return [(name, kinds[kind.rstrip("_")]) for kind, listed in names.items() for name in listed.split()]
