"""Calls into the compiled kernels: argument types, and the check that a kernel can read its tensors."""

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
    """The kernel library for `dtype` if all tensors are contiguous CPU tensors of the expected dtype, else None.

    `narrow` tensors must have the compute dtype, `dtype`; `wide` tensors the accumulation dtype, float32; `whole`
    tensors int64. Tensors that are None are ignored.
    """
    for expected, tensors in ((dtype, narrow), (torch.float32, wide), (torch.int64, whole)):
        for tensor in tensors:
            if tensor is not None and (
                tensor.dtype != expected or tensor.device.type != "cpu" or not tensor.is_contiguous()
            ):
                return None
    return library(dtype)


def new_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialized CPU tensor for a kernel to write to, independent of torch's default dtype and device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's data as a kernel argument; None for no tensor."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def int64(number: int) -> ctypes.c_int64:
    """A size or index as a kernel argument."""
    return ctypes.c_int64(number)


def thread_count() -> ctypes.c_int:
    """torch's number of threads as a kernel argument."""
    return ctypes.c_int(torch.get_num_threads())


def layer_fields(**names: str) -> list[tuple[str, type]]:
    """The ctypes fields of a struct in kernels.c.

    Each keyword is a kind ("whole" int64, "real" float, "at" pointer) with the names of its fields, in struct order. A
    trailing "_" allows a kind to occur again.
    """
    kinds = {"whole": ctypes.c_int64, "real": ctypes.c_float, "at": ctypes.c_void_p}
    return [(name, kinds[kind.rstrip("_")]) for kind, listed in names.items() for name in listed.split()]
