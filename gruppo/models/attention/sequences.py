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

from gruppo.utils.transfer import upload

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

    The gradient of a row is the sum over its places, in float32 (or float64), in the order of the places. Only reads
    are indexed, never additions: on CUDA, `index_add_` adds in the order in which threads arrive, or sorts first.
    """

    def __init__(self, source: Places, rows: int, device: torch.device, real: np.ndarray | None = None) -> None:
        """`source`: the row that is copied to each place. `rows`: the number of rows; each has a real place.

        `real`: whether the gradient of a place counts; by default that of every place. Others must have gradient 0.
        """
        places = np.arange(len(source)) if real is None else np.flatnonzero(real)
        places = places[np.argsort(source[places], kind="stable")]  # by row, and by place within a row
        counts = np.bincount(source[places], minlength=rows)
        starts = counts.cumsum() - counts
        order = np.argsort(-counts, kind="stable")  # rows with more places first, so that those with n are a slice
        inverse, first = np.argsort(order), places[starts]
        owner = np.full(len(source), rows)
        owner[first] = np.arange(rows)
        nth = [places[starts[order[: (counts > n).sum()]] + n] for n in range(counts.max())]
        self.source, self.first, self.owner, self._inverse, *self._nth = upload(
            [source, first, owner, inverse, *nth], torch.long, device
        )

    def __call__(self, rows: Float[Tensor, "T ..."]) -> Float[Tensor, "M ..."]:
        """The row of each place."""
        repeated: Tensor = _Repeat.apply(rows, self)  # type: ignore[no-untyped-call]
        return repeated

    def backward(self, grad: Float[Tensor, "M ..."]) -> Float[Tensor, "T ..."]:
        """The gradient of the rows."""
        if len(self._nth) == 1:
            return grad.index_select(0, self.first)
        total = grad.index_select(0, self._nth[0]).to(torch.promote_types(grad.dtype, torch.float32))
        for places in self._nth[1:]:
            total[: len(places)] += grad.index_select(0, places)
        return total.index_select(0, self._inverse).to(grad.dtype)

    def first_places(self, places: Float[Tensor, "M ..."]) -> Float[Tensor, "T ..."]:
        """What is at the first place of each row. Other places get gradient 0."""
        rows: Tensor = _FirstPlaces.apply(places, self)  # type: ignore[no-untyped-call]
        return rows


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, repeat: Repeat) -> Tensor:
        ctx.repeat = repeat
        return rows.index_select(0, repeat.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.repeat.backward(grad), None


class _FirstPlaces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, repeat: Repeat) -> Tensor:
        ctx.repeat = repeat
        return places.index_select(0, repeat.first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])]).index_select(0, ctx.repeat.owner), None
