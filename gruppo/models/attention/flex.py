"""Attention over packed groups with torch's FlexAttention, compiled on CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from gruppo.models.attention.interface import Layer, soft_capped
from gruppo.models.attention.sequences import Layout
from gruppo.utils.transfer import upload

BLOCK = 128  # tokens of a block of the mask, FlexAttention's own default
SMALLEST = 1024  # tokens of the shortest row that is compiled

FlexKernel = Callable[..., Any]  # the signature of `flex_attention`


@cache
def compiled_kernel() -> FlexKernel:
    """FlexAttention as a fused kernel, compiled again for each length, kind of layer, and with or without gradients.

    Fails where it cannot be compiled: FlexAttention itself would compute tokens × tokens scores.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = max(config.recompile_limit, 64)
    kernel: FlexKernel = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return kernel


def padded_length(tokens: int) -> int:
    """The length that a row of `tokens` is padded to: 2ⁿ or 3 · 2ⁿ, at least `SMALLEST`.

    A kernel for each length would be compiled otherwise. Padding sees only itself, so it takes memory but hardly time.
    """
    power = 1 << (tokens - 1).bit_length()
    return max(SMALLEST, power * 3 // 4 if tokens <= power * 3 // 4 else power)


class FlexAttention:
    """Attention over a packed row of groups; see `SharedPrefixAttention` for what each token sees.

    Nothing is repeated: a block mask names the blocks of keys that each block of queries sees, at most once per plan
    and window. It is computed from the lengths, never from a tokens × tokens mask. Windows are part of the mask, soft
    caps a function of the scores, and sinks a factor from the log-sum-exp of the scores.
    """

    wide = False

    def __init__(self, groups: Layout, device: torch.device, kernel: FlexKernel | None = None) -> None:
        """`kernel`: by default the compiled one. torch has no backward pass of it for a CPU."""
        self.device, self.kernel = device, kernel or compiled_kernel()
        self.tokens = sum(prompt + sum(completions) for prompt, completions in groups)
        self.length = padded_length(self.tokens)
        self.keys = _SeenKeys(groups, self.length - self.tokens)
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        query, key, value = (pad(part, (0, 0, 0, self.length - self.tokens)) for part in (query, key, value))
        options = {
            "score_mod": None if layer.softcap is None else _capping(layer.softcap),
            "block_mask": self.block_mask(layer.window),
            "scale": layer.scale,
            "enable_gqa": query.shape[1] != key.shape[1],
        }
        if layer.sinks is None:
            output: Tensor = self.kernel(query, key, value, **options)
        else:
            output, extra = self.kernel(query, key, value, **options, return_aux=AuxRequest(lse=True))
            # A sink is one more score in the softmax: the others keep exp(lse) of exp(lse) + exp(sink).
            share = torch.sigmoid(extra.lse - layer.sinks.to(extra.lse.dtype)[:, None])
            output = (output * share[..., None]).to(value.dtype)
        return output[:, :, : self.tokens].transpose(1, 2)

    def block_mask(self, window: int | None) -> BlockMask:
        """The mask of a layer with this window, or without one."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> BlockMask:
        some, whole = self.keys.blocks(window)
        columns = (self.keys.sequence, self.keys.prompt, self.keys.position)
        vectors = [*columns, *(array.ravel() for array in (*some, *whole))]
        sequence, prompt, position, *blocks = upload(vectors, torch.int32, self.device)
        count = len(some[0])
        numbers, indices, whole_numbers, whole_indices = (
            part.view(1, 1, *((count,) if len(part) == count else (count, count))) for part in blocks
        )
        return BlockMask.from_kv_blocks(
            numbers,
            indices,
            whole_numbers,
            whole_indices,
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask(sequence, prompt, position, window),
            seq_lengths=(self.length, self.length),
        )


def _mask(
    sequence: Int[Tensor, " T"], prompt: Int[Tensor, " T"], position: Int[Tensor, " T"], window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, for FlexAttention; see `_SeenKeys` for the columns."""

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (sequence[key] == sequence[query]) | (sequence[key] == prompt[query])
        return same & (position[key] <= position[query])

    if window is None:
        return sees
    limit = window

    def sees_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (position[query] - position[key] < limit)

    return sees_window


def _capping(cap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return soft_capped(score, cap)

    return capped


# The number of blocks for each block of queries [n], and which they are [n, n], followed by the others.
_Blocks = tuple[Int[np.ndarray, " n"], Int[np.ndarray, "n n"]]


class _SeenKeys:
    """The keys that each query sees: of its prompt and of its own sequence, up to itself. Padding sees itself.

    For each token: `sequence`, a number of its prompt or completion; `prompt`, that of the prompt of its group;
    `position` after the start of the prompt; `prompt_start`, `prompt_end` and `start`, the places in the packed row
    where its prompt and its own sequence start and end.
    """

    def __init__(self, groups: Layout, padding: int) -> None:
        """`padding`: the number of tokens after the groups."""
        columns: list[tuple[int, ...]] = []
        lengths: list[int] = []
        start = 0
        for prompt, completions in groups:
            first, prompt_start, prompt_end = len(lengths), start, start + prompt
            for length in (prompt, *completions):
                shift = 0 if start == prompt_start else prompt
                columns.append((len(lengths), first, shift, prompt_start, prompt_end, start))
                lengths.append(length)
                start += length
        table = np.repeat(np.array(columns), lengths, axis=0).T
        # Each token of the padding is a prompt of its own.
        numbers, places = len(lengths) + np.arange(padding), start + np.arange(padding)
        table = np.hstack([table, [numbers, numbers, 0 * places, places, places + 1, places]])
        self.sequence, self.prompt, shift, self.prompt_start, self.prompt_end, self.start = table
        self.place = np.arange(start + padding)
        self.position = self.place - self.start + shift

    def blocks(self, window: int | None) -> tuple[_Blocks, _Blocks]:
        """The blocks of keys that some query of each block sees in part, and those that all see as a whole."""
        end = self.place + 1
        start = self.start if window is None else np.maximum(self.start, end - window)
        own = self.sequence == self.prompt
        prompt_end = np.where(own, start, self.prompt_end)
        prompt_start = self.prompt_start
        if window is not None:
            prompt_start = np.maximum(prompt_start, prompt_start + self.position + 1 - window)
        prompt_start = np.minimum(np.where(own, start, prompt_start), prompt_end)
        # The keys of a query are two ranges; where they meet (prompt and first completion), they are one.
        meet = prompt_end == start
        start = np.where(meet, prompt_start, start)
        prompt_start = np.where(meet, prompt_end, prompt_start)
        count = len(self.place) // BLOCK
        touched, covered = np.zeros((2, count, count + 1), dtype=np.int64)
        for first, last in ((prompt_start, prompt_end), (start, end)):
            _count_blocks(touched, self.place, first // BLOCK, -(-last // BLOCK), last > first)
            _count_blocks(covered, self.place, -(-first // BLOCK), last // BLOCK, last > first)
        some, whole = (table.cumsum(axis=1)[:, :count] for table in (touched, covered))
        seen_whole = whole == BLOCK
        return _listed((some > 0) & ~seen_whole), _listed(seen_whole)


def _count_blocks(
    table: Int[np.ndarray, "n m"],
    place: Int[np.ndarray, " T"],
    first: Int[np.ndarray, " T"],
    last: Int[np.ndarray, " T"],
    used: Bool[np.ndarray, " T"],
) -> None:
    """Add 1 at the block where the range [first, last) of each query starts, and -1 where it ends."""
    used = used & (last > first)
    np.add.at(table, (place[used] // BLOCK, first[used]), 1)
    np.add.at(table, (place[used] // BLOCK, last[used]), -1)


def _listed(blocks: Bool[np.ndarray, "n n"]) -> _Blocks:
    """The marked blocks of each row."""
    numbers = np.argsort(~blocks, axis=1, kind="stable")
    return blocks.sum(axis=1).astype(np.int32), numbers.astype(np.int32)
