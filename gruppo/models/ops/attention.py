"""Attention over packed groups and over the completions in flight."""

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
    """`struct decoding` of kernels.c."""

    _fields_ = layer_fields(
        whole="rows queries keys own_room prefix_room window",
        at="projected cosine sine query_norm key_norm",
        real="epsilon scale",
        at_="own_keys own_values prefix_keys prefix_values order place prefix_length position made",
    )


class _Packing(ctypes.Structure):
    """`struct packing` of kernels.c."""

    _fields_ = layer_fields(
        whole="groups queries keys window",
        at="first start length query key value",
        real="scale",
        at_="made normaliser grad of_query of_key of_value",
    )


_EVERYTHING = 2**62  # a window that nothing is outside of


class PackedLayout:
    """Where the sequences of a packed row lie: of each group its prompt, then its completions."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """`groups`: for each, the length of its prompt and of its completions, in tokens."""
        lengths = [[prompt, *completions] for prompt, completions in groups]
        self.groups = len(groups)
        with torch.device("cpu"):
            self.length = torch.tensor([each for own in lengths for each in own], dtype=torch.int64)
            self.start = self.length.cumsum(0) - self.length
            self.first = torch.tensor([0, *map(len, lengths)], dtype=torch.int64).cumsum(0)

    def fits(self, *tensors: Float[Tensor, "N heads D"]) -> bool:
        """Whether `attend_packed` can attend between them, and is quick: a thread takes a key head of a group."""
        width, keys = tensors[-1].shape[-1], tensors[-1].shape[1]
        return (
            all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
            and {each.shape[-1] for each in tensors} == {width}
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

    A prompt's token sees the prompt up to itself, a completion's the whole prompt of its group and its own completion
    up to itself; of that, where there is a window, the last so many. All contiguous, and such as the layout `fits`.
    """
    made, normaliser = torch.empty_like(query), query.new_empty(query.shape[:2])
    _attend_packed([query, key, value], layout, scale, window, [made, normaliser, None, None, None, None])
    return made, normaliser


def attend_packed_backward(
    grad: Float[Tensor, "N Q D"],
    tensors: Sequence[Tensor],
    made: tuple[Float[Tensor, "N Q D"], Float[Tensor, "N Q"]],
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which are `tensors`; `made` is what `attend_packed` made of them."""
    query, key, value = torch.empty_like(tensors[0]), torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])
    _attend_packed(tensors, layout, scale, window, [*made, grad, query, key, value])
    return query, key, value


def _attend_packed(
    tensors: Sequence[Tensor], layout: PackedLayout, scale: float, window: int | None, rest: Sequence[Tensor | None]
) -> None:
    kernels = library(torch.float32)
    assert kernels is not None
    packing = _Packing(
        layout.groups, tensors[0].shape[1], tensors[1].shape[1], _EVERYTHING if window is None else window,
        *(each.data_ptr() for each in (layout.first, layout.start, layout.length, *tensors)), scale,
        *(None if each is None else each.data_ptr() for each in rest),
    )  # fmt: skip
    backward = ctypes.c_int(rest[2] is not None)
    if kernels.attend_packed(int64(tensors[0].shape[-1]), ctypes.byref(packing), backward, thread_count()):
        raise MemoryError("the attention of a packed row")


def attend_decoding(
    projected: Float[Tensor, "N Q+2*K D"],
    queries: int,
    rope: Rope,
    norms: QKNorm,
    scale: float,
    window: int | None,
    own: tuple[Float[Tensor, "S K T D"], Float[Tensor, "S K T D"]],
    prefix: tuple[Float[Tensor, "P K R D"], Float[Tensor, "P K R D"]],
    rows: Sequence[Int[Tensor, " N"]],
) -> Float[Tensor, "N Q*D"] | None:
    """Attention of a decoding step, narrow; None where no kernel can do it, and nothing has happened then.

    Each row's queries and key are turned (and normed) as by `apply_rope`, its key and value written to the stores of
    its own tokens, row n to slot n; its queries then see the last `window` positions (all without one) of its prompt
    and its own tokens. `rows` are four: an order of rows in which those of one prompt stand together; each row's place
    among the prompts, the length of that prompt, and the position in its own store that it writes to.
    """
    count, heads, width = projected.shape
    wide = [*rope, *norms[:2], *own, *prefix]
    kernels = kernels_for(projected.dtype, narrow=[projected], wide=wide, whole=rows)
    if kernels is None or own[0].shape != own[1].shape or width % 16:
        return None
    made = projected.new_empty(count, queries * width)
    addresses = [None if each is None else each.data_ptr() for each in (projected, *rope, *norms[:2])]
    step = _Decoding(
        count, queries, (heads - queries) // 2, own[0].shape[2], prefix[0].shape[2],
        _EVERYTHING if window is None else window, *addresses, norms[2], scale,
        *(each.data_ptr() for each in (*own, *prefix, *rows, made)),
    )  # fmt: skip
    if kernels.attend(int64(width), ctypes.byref(step), thread_count()):
        raise MemoryError("the attention of a decoding step")
    return made
