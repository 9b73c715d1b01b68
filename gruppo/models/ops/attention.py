"""Attention over packed groups, and of decoding steps over concurrent completions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.models.ops.cpu.bindings import int64, kernels_for, layer_fields, thread_count
from gruppo.models.ops.cpu.build import library
from gruppo.models.ops.rope import QKNorm, Rope


class _Decoding(ctypes.Structure):
    """`struct decoding` in kernels.c."""

    _fields_ = layer_fields(
        whole="rows queries keys own_room prefix_room window",
        at="projected cosine sine query_norm key_norm",
        real="epsilon scale",
        at_="own_keys own_values prefix_keys prefix_values order place prefix_length position made",
    )


class _Packing(ctypes.Structure):
    """`struct packing` in kernels.c."""

    _fields_ = layer_fields(
        whole="groups queries keys window",
        at="first start length query key value",
        real="scale",
        at_="made normaliser grad of_query of_key of_value",
    )


_NO_WINDOW = 2**62  # a window larger than any sequence


class PackedLayout:
    """Positions of the sequences in a packed row: for each group its prompt, then its completions."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """`groups`: for each group, the length of its prompt and the lengths of its completions, in tokens."""
        lengths = [[prompt, *completions] for prompt, completions in groups]
        self.groups = len(groups)
        with torch.device("cpu"):
            self.length = torch.tensor([length for group in lengths for length in group], dtype=torch.int64)
            self.start = self.length.cumsum(0) - self.length
            self.first = torch.tensor([0, *map(len, lengths)], dtype=torch.int64).cumsum(0)

    def fits(self, *tensors: Float[Tensor, "N heads D"]) -> bool:
        """Whether `attend_packed` supports these tensors and keeps all threads busy.

        Each thread processes one key head of one group.
        """
        width, keys = tensors[-1].shape[-1], tensors[-1].shape[1]
        return (
            all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
            and {tensor.shape[-1] for tensor in tensors} == {width}
            and width % 16 == 0
            and self.groups * keys >= torch.get_num_threads()
            and library(torch.float32) is not None
        )


def attend_packed(
    query: Float[Tensor, "N Q D"],
    key: Float[Tensor, "N K D"],
    value: Float[Tensor, "N K D"],
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> tuple[Float[Tensor, "N Q D"], Float[Tensor, "N Q"]]:
    """Attention over a packed row of groups, and the log-sum-exp of each query's scores, scale · q·k.

    A prompt token sees its prompt up to itself. A completion token sees the prompt of its group and its own completion
    up to itself. With a `window`, both see only the last `window` positions of these. All tensors are contiguous and
    must pass `layout.fits`. Raises MemoryError if the kernel cannot allocate memory.
    """
    output, normalizer = torch.empty_like(query), query.new_empty(query.shape[:2])
    _attend_packed([query, key, value], layout, scale, window, [output, normalizer, None, None, None, None])
    return output, normalizer


def attend_packed_backward(
    grad: Float[Tensor, "N Q D"],
    tensors: Sequence[Tensor],
    result: tuple[Float[Tensor, "N Q D"], Float[Tensor, "N Q"]],
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value (`tensors`).

    `grad` is the gradient of the output, and `result` the result of `attend_packed`.
    """
    query, key, value = torch.empty_like(tensors[0]), torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])
    _attend_packed(tensors, layout, scale, window, [*result, grad, query, key, value])
    return query, key, value


def _attend_packed(
    tensors: Sequence[Tensor], layout: PackedLayout, scale: float, window: int | None, rest: Sequence[Tensor | None]
) -> None:
    kernels = library(torch.float32)
    assert kernels is not None
    packing = _Packing(
        layout.groups, tensors[0].shape[1], tensors[1].shape[1], _NO_WINDOW if window is None else window,
        *(tensor.data_ptr() for tensor in (layout.first, layout.start, layout.length, *tensors)), scale,
        *(None if tensor is None else tensor.data_ptr() for tensor in rest),
    )  # fmt: skip
    backward = ctypes.c_int(rest[2] is not None)
    if kernels.attend_packed(int64(tensors[0].shape[-1]), ctypes.byref(packing), backward, thread_count()):
        raise MemoryError("not enough memory for the attention of a packed row")


def attend_decoding(
    projected: Float[Tensor, "N Q+2*K D"],
    queries: int,
    rope: Rope,
    norms: QKNorm,
    scale: float,
    window: int | None,
    completions: tuple[Float[Tensor, "S K T D"], Float[Tensor, "S K T D"]],
    prefix: tuple[Float[Tensor, "P K R D"], Float[Tensor, "P K R D"]],
    rows: Sequence[Int[Tensor, " N"]],
) -> Float[Tensor, "N Q*D"] | None:
    """Attention of a decoding step, in the compute dtype; None, without side effects, if no kernel supports the input.

    As in `apply_rope`, queries and keys are normalized (if `norms` has weights) and rotary embeddings are applied. The
    key and value of row n are then written to slot n of `completions`. The queries of the row see the last
    `window` positions (all without a window) of its prompt and its own completion.

    `completions` and `prefix` are the keys and values of the slots and of the prompts.

    `rows` has four tensors: an order of the rows in which rows with the same prompt are adjacent; the index of each
    row's prompt in `prefix`; the length of this prompt; and the position in `completions` that the row writes to.
    Raises MemoryError if the kernel cannot allocate memory.
    """
    count, heads, width = projected.shape
    accumulated = [*rope, *norms[:2], *completions, *prefix]
    kernels = kernels_for(projected.dtype, narrow=[projected], wide=accumulated, whole=rows)
    if kernels is None or completions[0].shape != completions[1].shape or width % 16:
        return None
    output = projected.new_empty(count, queries * width)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (projected, *rope, *norms[:2])]
    step = _Decoding(
        count, queries, (heads - queries) // 2, completions[0].shape[2], prefix[0].shape[2],
        _NO_WINDOW if window is None else window, *addresses, norms[2], scale,
        *(tensor.data_ptr() for tensor in (*completions, *prefix, *rows, output)),
    )  # fmt: skip
    if kernels.attend(int64(width), ctypes.byref(step), thread_count()):
        raise MemoryError("not enough memory for the attention of a decoding step")
    return output
