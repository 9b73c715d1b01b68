"""Which rows of a decoding step attend to which pages of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gruppo.engines.native.kv_cache import PageStore
from gruppo.engines.native.scheduler import Scheduler
from gruppo.utils.transfer import upload

_NOWHERE = 2**40  # where an unused page begins: behind the end of every sequence


@dataclass(frozen=True, eq=False)
class Piece:
    """The first pages of a block, each with the `per` rows that attend to it.

    `rows`: these rows, page by page (row 0 fills up); None if they are all rows, in order. `start`: the index of
    each page's first token in its prompt or completion. `of_prompts`: whether these are pages of prompts.
    """

    store: PageStore
    block: int
    pages: int
    per: int
    rows: Int[Tensor, " pages*per"] | None
    start: Int[Tensor, " pages"]
    of_prompts: bool


@dataclass(frozen=True, eq=False)
class Written:
    """The rows whose next key and value belong into a block, and their pages in it; None: all rows, in order."""

    block: int
    rows: Int[Tensor, " n"] | None
    pages: Int[Tensor, " n"] | None


class DecodingLayout:
    """Which rows attend to which pages: those of their prompt, which they share with other rows, and their own.

    It is the same for every step until rows or pages change, and is then uploaded in one transfer.

    `slots`: the slot of each row. `prompt_lengths`: the tokens of each row's prompt. `before`: those between its prompt
    and its completion, in its own pages. `order`: an order of the rows in which those with the same prompt are
    adjacent. `prompt_pages`: the first page of each row's prompt. `pieces`: the pages in use. Attention to them gives
    one partial result per page and row. `parts`: which of these results belong to each row, -1 where there are no more.
    """

    def __init__(self, scheduler: Scheduler, device: torch.device) -> None:
        self.cache, slots = scheduler.cache, scheduler.active
        self.live, every = len(slots), np.arange(len(slots))
        entries, group = np.unique(scheduler.entry[slots], return_inverse=True)
        order = np.argsort(group, kind="stable")
        rank = np.empty(self.live, dtype=np.int64)  # of the row among those of its prompt
        rank[order] = every - np.searchsorted(group[order], np.arange(len(entries)))[group[order]]
        rows_of_entry = np.zeros((len(entries), int(rank.max()) + 1), dtype=np.int64)
        rows_of_entry[group, rank] = every
        completions, prompts = self.cache.completions, self.cache.prompts
        table, lengths = completions.table[slots], self.cache.prompt_lengths[entries]
        self.longest_prompt = int(lengths.max())
        own, own_results = _pieces(completions, table, every[:, None], 0)
        count = sum(len(piece.rows) for piece in own)
        shared, results = _pieces(prompts, prompts.table[entries], rows_of_entry, count)
        parts = np.concatenate([own_results, np.where(results[group] < 0, -1, results[group] + rank[:, None])], axis=1)
        before = scheduler.before[slots]
        written = _written(completions, table, scheduler.next_place[slots])
        arrays = [slots, before, lengths[group], order, prompts.table[entries[group], 0]]
        arrays += [parts[:, (parts >= 0).any(axis=0)]]
        arrays += [array for piece in (*own, *shared) for array in (piece.rows, piece.start)]
        arrays += [array for _, rows, pages in written for array in (rows, pages)]
        tensors = iter(upload(arrays, torch.long, device))
        self.slots, self.before, self.prompt_lengths = (next(tensors) for _ in range(3))
        self.order, self.prompt_pages, parts_there = (next(tensors) for _ in range(3))
        self.missing = torch.zeros(parts_there.shape, device=device).masked_fill_(parts_there < 0, -torch.inf)
        self.parts = parts_there.clamp(min=0)
        self.pieces = []
        for piece, of_prompts in [(piece, False) for piece in own] + [(piece, True) for piece in shared]:
            rows, start = next(tensors), next(tensors)
            in_order = np.array_equal(piece.rows, every)
            self.pieces.append(
                Piece(
                    prompts if of_prompts else completions, piece.block, len(piece.start),
                    len(piece.rows) // len(piece.start), None if in_order else rows, start, of_prompts,
                )
            )  # fmt: skip
        self.written = []
        for block, places, pages_there in written:
            rows, pages = next(tensors), next(tensors)
            in_order = len(written) == 1 and np.array_equal(pages_there, every)
            self.written.append(Written(block, None if len(places) == self.live else rows, None if in_order else pages))


@dataclass(frozen=True)
class _Pages:
    """A `Piece` on the host."""

    block: int
    rows: np.ndarray
    start: np.ndarray


def _pieces(store: PageStore, table: np.ndarray, rows: np.ndarray, first: int) -> tuple[list[_Pages], np.ndarray]:
    """The pages in use, and where the results of each page of `table` begin if the first is number `first`.

    `table`: the pages of the sequences, -1 where there is none. `rows` [sequences, per]: the rows that attend to each.
    """
    sequence, number = np.nonzero(table >= 0)
    used = table[sequence, number]
    owner, start = np.zeros(len(store.used), dtype=np.int64), np.full(len(store.used), _NOWHERE)
    owner[used], start[used] = sequence, number * store.page_tokens
    pieces, results = [], np.full(len(store.used), -1, dtype=np.int64)
    for block, (low, high) in enumerate(pairwise(store.block_starts)):
        inside = used[(low <= used) & (used < high)]
        if len(inside):
            pages = slice(low, int(inside.max()) + 1)
            pieces.append(_Pages(block, rows[owner[pages]].ravel(), start[pages]))
            results[pages] = first + rows.shape[1] * np.arange(pages.stop - low)
            first += len(pieces[-1].rows)
    return pieces, np.where(table < 0, -1, results[table])


def _written(store: PageStore, table: np.ndarray, places: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """For each block that the rows write their token number `places` to: the rows, and their pages in the block."""
    pages = table[np.arange(len(table)), places // store.page_tokens]
    found = []
    for block, (low, high) in enumerate(pairwise(store.block_starts)):
        rows = np.flatnonzero((low <= pages) & (pages < high))
        if len(rows):
            found.append((block, rows, pages[rows] - low))
    return found
