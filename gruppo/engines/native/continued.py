"""Attention of tokens that continue what the cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.engines.native.kv_cache import KVCache, PageStore
from gruppo.models.attention.interface import Layer
from gruppo.models.attention.shared_prefix import attend_masked
from gruppo.utils.transfer import upload


class Continued(NamedTuple):
    """A sequence in the cache: the slot and the prompt entry that it is in, the tokens of its prompt, those that follow
    it in the slot, and those that are new."""

    slot: int
    entry: int
    prompt: int
    before: int
    new: int


class ContinuedAttention:
    """Attention of the new tokens of sequences, packed into one row.

    A new token sees the whole prompt and what follows it, up to itself. The keys and values of the new tokens are
    written to the pages of the slots, which have to be reserved. Sequences with at least half as many new tokens as
    the one that has most are computed together, so at most half of the queries is padding.
    """

    def __init__(self, cache: KVCache, sequences: Sequence[Continued], device: torch.device) -> None:
        self.cache, self.wide, self.device = cache, cache.dtype != torch.bfloat16, device
        slot, entry, prompt, before, new = np.array(sequences).T
        starts = new.cumsum() - new
        self._written = _places(cache.completions, slot, before, new, starts, device)
        self._batches, order = [], np.argsort(-new, kind="stable")
        while len(order):
            count = int((2 * new[order] >= new[order[0]]).sum())
            chosen, order = order[:count], order[count:]
            arrays = slot[chosen], entry[chosen], prompt[chosen], before[chosen], new[chosen], starts[chosen]
            self._batches.append(_Batch(cache, *arrays, device))

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        with torch.autocast(self.device.type, enabled=False):
            rows = [tensor[0].transpose(0, 1).to(self.cache.dtype) for tensor in (query, key, value)]
            for block, places, pages, offsets in self._written:
                for store, tensor in zip(self.cache.completions.pair(layer.index, block), rows[1:], strict=True):
                    store[pages, :, offsets] = tensor[places]
            output = rows[0].new_empty(*rows[0].shape[:2], value.shape[-1])
            for batch in self._batches:
                batch.attend(layer, rows[0], output)
            return output[None]


class _Batch:
    """Sequences that are computed together; queries and keys are padded to those of the longest.

    The padding of queries repeats the last new token of a sequence, and its results are dropped.
    """

    def __init__(
        self,
        cache: KVCache,
        slot: np.ndarray,
        entry: np.ndarray,
        prompt: np.ndarray,
        before: np.ndarray,
        new: np.ndarray,
        starts: np.ndarray,
        device: torch.device,
    ) -> None:
        self.device, self.sizes = device, (len(slot), int(new.max()))
        self._prompts = _Reading.of(cache.prompts, entry, prompt, device)
        self._own = _Reading.of(cache.completions, slot, before + new, device)
        self._masks: dict[tuple[int | None, int], Tensor] = {}
        place = np.arange(new.max())
        token = np.minimum(place, new[:, None] - 1)
        real = np.flatnonzero(place < new[:, None])
        source = (starts[:, None] + token).ravel()
        arrays = [source, real, source[real], prompt[:, None], before[:, None] + token]
        self._source, self._real, self._target, self._prompt, self._position = upload(arrays, torch.long, device)

    def attend(self, layer: Layer, query: Float[Tensor, "N heads D"], output: Float[Tensor, "N heads E"]) -> None:
        """Write the results of the tokens of these sequences to `output`."""
        pairs = zip(self._prompts.pair(layer.index), self._own.pair(layer.index), strict=True)
        keys, values = (torch.cat(parts, dim=2) for parts in pairs)
        (count, most), heads, kv_heads = self.sizes, query.shape[1], keys.shape[1]
        shared = heads // kv_heads
        queries = query.index_select(0, self._source).view(count, most, kv_heads, shared, -1)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, shared * most, -1)
        result = attend_masked(layer, queries, keys, values, self._mask(layer.window, shared))
        result = result.view(count, kv_heads, shared, most, -1).permute(0, 3, 1, 2, 4)
        output[self._target] = result.reshape(count * most, heads, -1).index_select(0, self._real)

    def _mask(self, window: int | None, shared: int) -> Tensor:
        """Which keys the queries see: [sequences, 1, shared · tokens, prompt keys + own keys]."""
        if (window, shared) not in self._masks:
            prompt, position = self._prompt[..., None], self._position[..., None]
            of_prompt, own = (torch.arange(part.tokens, device=self.device) for part in (self._prompts, self._own))
            sees_prompt, sees_own = of_prompt < prompt.expand_as(position), own <= position
            if window is not None:
                sees_prompt = sees_prompt & (prompt + position - of_prompt < window)
                sees_own = sees_own & (position - own < window)
            seen = torch.cat([sees_prompt, sees_own], dim=-1)
            self._masks[window, shared] = seen.repeat(1, shared, 1)[:, None]
        return self._masks[window, shared]


@dataclass(frozen=True, eq=False)
class _Reading:
    """The first `tokens` tokens of sequences in pages. Sequences that are shorter have others at their end.

    `parts`: a block, and the pages in it that are read. `order`: where each page of each sequence is among all parts;
    None: where it is read.
    """

    store: PageStore
    sequences: int
    tokens: int
    parts: list[tuple[int, Tensor]]
    order: Tensor | None

    @classmethod
    def of(cls, store: PageStore, sequences: np.ndarray, lengths: np.ndarray, device: torch.device) -> _Reading:
        tokens = int(lengths.max())
        table = store.table[sequences][:, : -(-tokens // store.page_tokens)]
        pages = np.where(table < 0, table[:, :1], table).ravel()
        read = [(block, np.flatnonzero(inside), pages[inside] - low) for block, low, inside in _by_block(store, pages)]
        order = np.argsort(np.concatenate([places for _, places, _ in read]))
        *parts, order_there = upload([*(there for _, _, there in read), order], torch.long, device)
        blocks = [block for block, _, _ in read]
        return cls(
            store, len(sequences), tokens, list(zip(blocks, parts, strict=True)), order_there if len(read) > 1 else None
        )

    def pair(self, layer: int) -> tuple[Float[Tensor, "S heads tokens D"], Float[Tensor, "S heads tokens D"]]:
        """Keys and values of the sequences."""
        keys, values = (self._read(layer, number) for number in range(2))
        return keys, values

    def _read(self, layer: int, number: int) -> Tensor:
        size = min(self.store.page_tokens, self.tokens)
        read = [
            self.store.pair(layer, block)[number][:, :, :size].index_select(0, pages) for block, pages in self.parts
        ]
        joined = read[0] if self.order is None else torch.cat(read).index_select(0, self.order)
        _, heads, _, width = joined.shape
        by_sequence = joined.view(self.sequences, -1, heads, size, width).transpose(1, 2)
        return by_sequence.reshape(self.sequences, heads, -1, width)[:, :, : self.tokens]


def _by_block(store: PageStore, pages: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """For each block that has some of the pages: its number, its first page, and which pages it has."""
    for block, (low, high) in enumerate(pairwise(store.block_starts)):
        inside = (low <= pages) & (pages < high)
        if inside.any():
            yield block, low, inside


def _places(
    store: PageStore, slot: np.ndarray, before: np.ndarray, new: np.ndarray, starts: np.ndarray, device: torch.device
) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Where the new tokens of sequences belong: for each block their rows, their pages in it, and places in these."""
    sequence = np.repeat(np.arange(len(new)), new)
    position = np.arange(new.sum()) - starts[sequence] + before[sequence]
    pages = store.table[slot[sequence], position // store.page_tokens]
    found = []
    for block, low, inside in _by_block(store, pages):
        arrays = [np.flatnonzero(inside), pages[inside] - low, position[inside] % store.page_tokens]
        rows, there, offsets = upload(arrays, torch.long, device)
        found.append((block, rows, there, offsets))
    return found
