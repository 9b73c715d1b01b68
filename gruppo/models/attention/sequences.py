"""Packed groups as separate sequences: where each token of a sequence is in the packed row.

A kernel for plain sequences reads the prompt once per completion. So the keys and values of a prompt are repeated, and
their gradients summed, here in float32 and in a fixed order, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# For each group, the length of its prompt and of its completions, in tokens; all >= 1.
Layout = Sequence[tuple[int, Sequence[int]]]
Places = np.ndarray[Any, np.dtype[np.int64]]


def prompt_and_completions(groups: Layout) -> list[tuple[Places, list[Places]]]:
    """For each group, the places in the packed row of its prompt and of each of its completions."""
    found, start = [], 0
    for prompt, completions in groups:
        ends = start + prompt + np.cumsum([0, *completions])
        parts = [np.arange(first, last) for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        found.append((np.arange(start, start + prompt), parts))
        start = int(ends[-1])
    return found


class Repeat:
    """Copies rows of a packed tensor to the places of sequences, some rows to several places.

    The gradient of a row is the sum over its places, in float32 (or float64). It is made of additions that each add at
    most one place to a row. So its order does not depend on the device's scheduling, as that of `index_add_` would.
    """

    def __init__(self, source: Places, rows: int, device: torch.device, real: np.ndarray | None = None) -> None:
        """`source`: the row that is copied to each place. `rows`: the number of rows; each has a real place.

        `real`: whether the gradient of a place counts; by default that of every place. Others must have gradient 0.
        """
        places = np.arange(len(source)) if real is None else np.flatnonzero(real)
        places = places[np.argsort(source[places], kind="stable")]  # by row, and by place within a row
        row = source[places]
        starts = np.searchsorted(row, np.arange(rows))
        rank = np.arange(len(row)) - starts[row]
        tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        self.source = tensor(source)
        self.first = tensor(places[rank == 0])
        self.more = [(tensor(row[rank == n]), tensor(places[rank == n])) for n in range(1, int(rank.max()) + 1)]

    def __call__(self, rows: Float[Tensor, "T ..."]) -> Float[Tensor, "M ..."]:
        """The row of each place."""
        repeated: Tensor = _Repeat.apply(rows, self)  # type: ignore[no-untyped-call]
        return repeated

    def backward(self, grad: Float[Tensor, "M ..."]) -> Float[Tensor, "T ..."]:
        """The gradient of the rows."""
        total = grad.index_select(0, self.first)
        if not self.more:
            return total
        total = total.to(torch.promote_types(grad.dtype, torch.float32))
        for rows, places in self.more:
            total.index_add_(0, rows, grad.index_select(0, places).to(total.dtype))
        return total.to(grad.dtype)


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, repeat: Repeat) -> Tensor:
        ctx.repeat = repeat
        return rows.index_select(0, repeat.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.repeat.backward(grad), None
