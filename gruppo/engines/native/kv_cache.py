"""Key-value cache: prompts, shared by their completions, and the completions themselves, in pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gruppo.engines.native.kept import KeptPrompt, Pairs
from gruppo.models.attention.interface import Layer

PAGE_TOKENS = 256


def room(tokens: int, page_tokens: int | None) -> int:
    """Room, in tokens, that a sequence takes in pages of `page_tokens` tokens; None: one page of its length."""
    page = min(page_tokens or tokens, tokens)
    return -(-tokens // page) * page


class PageStore:
    """Keys and values of sequences, in pages of `page_tokens` tokens.

    Pages are allocated in blocks, when they are needed: each block at least doubles the number of pages, and no block
    is ever copied. `table` has the pages of each sequence, in order, -1 where there is none (yet).
    """

    def __init__(self, sequences: int, tokens: int, page_tokens: int | None, dtype: torch.dtype) -> None:
        """`tokens`: maximum length of a sequence. `page_tokens` None: one page per sequence, all in one block."""
        self.page_tokens, self.dtype, self.whole = min(page_tokens or tokens, tokens), dtype, page_tokens is None
        self.table = np.full((sequences, -(-tokens // self.page_tokens)), -1, dtype=np.int64)
        self.used = np.zeros(self.table.size, dtype=bool)
        self.block_starts = [0]  # the first page of each block, and the number of allocated pages
        self._blocks: list[dict[int, tuple[Tensor, Tensor]]] = []
        self._shapes: dict[int, tuple[tuple[int, int], tuple[int, int], torch.device]] = {}

    def describe(self, layer: int, pair: Sequence[Tensor]) -> None:
        """Set heads, widths and device of a layer: those of its keys and values [heads, tokens, D]."""
        (heads, _, width), (value_heads, _, value_width) = pair[0].shape, pair[1].shape
        self._shapes[layer] = (heads, width), (value_heads, value_width), pair[0].device

    def reserve(self, sequences: np.ndarray, tokens: np.ndarray) -> bool:
        """Give each of the sequences the pages for its first `tokens` tokens. Returns whether any page was missing."""
        needed = -(-tokens // self.page_tokens)
        missing = (self.table[sequences] < 0) & (np.arange(self.table.shape[1]) < needed[:, None])
        rows, places = np.nonzero(missing)
        if not len(rows):
            return False
        free = np.flatnonzero(~self.used[: self.block_starts[-1]])
        if len(free) < len(rows):
            self._grow(len(rows) - len(free))
            free = np.flatnonzero(~self.used[: self.block_starts[-1]])
        pages = free[: len(rows)]
        self.table[sequences[rows], places], self.used[pages] = pages, True
        return True

    def _grow(self, pages: int) -> None:
        allocated = self.block_starts[-1]
        more = len(self.used) if self.whole else max(pages, allocated)
        self.block_starts.append(min(len(self.used), allocated + more))
        self._blocks.append({})

    def release(self, sequence: int) -> None:
        """Free the pages of a sequence."""
        pages = self.table[sequence]
        self.used[pages[pages >= 0]] = False
        pages[:] = -1

    def pair(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, heads, page_tokens, D] of a layer in a block. Zeros at first, so always finite."""
        tensors = self._blocks[block]
        if layer not in tensors:
            *shapes, device = self._shapes[layer]
            pages = self.block_starts[block + 1] - self.block_starts[block]
            keys, values = (
                torch.zeros(pages, heads, self.page_tokens, width, dtype=self.dtype, device=device)
                for heads, width in shapes
            )
            tensors[layer] = keys, values
        return tensors[layer]

    def locate(self, page: int) -> tuple[int, int]:
        """The block of a page, and its index in the block."""
        block = int(np.searchsorted(self.block_starts, page, side="right")) - 1
        return block, page - self.block_starts[block]

    def store(self, layer: int, sequence: int, pair: Sequence[Tensor]) -> None:
        """Store the keys and values [heads, tokens, D] of a sequence from its beginning."""
        parts = zip(*(tensor.split(self.page_tokens, dim=1) for tensor in pair), strict=True)
        for page, part in zip(self.table[sequence].tolist(), parts, strict=False):
            block, index = self.locate(page)
            for target, tokens in zip(self.pair(layer, block), part, strict=True):
                target[index, :, : tokens.shape[1]] = tokens

    def restore(self, sequence: int, pairs: Pairs) -> None:
        """Store the keys and values of all layers of a sequence that has its pages."""
        for layer, pair in pairs.items():
            self.store(layer, sequence, pair)

    def copy(self, sequence: int, tokens: int) -> Pairs:
        """A copy of the keys and values of the first `tokens` tokens of a sequence, in all layers."""
        places = [self.locate(page) for page in self.table[sequence].tolist() if page >= 0]
        return {layer: self._copied(layer, places, tokens) for layer in self._shapes} if tokens else {}

    def _copied(self, layer: int, places: Sequence[tuple[int, int]], tokens: int) -> tuple[Tensor, Tensor]:
        pages = [self.pair(layer, block) for block, _ in places]
        sizes = [min(self.page_tokens, tokens - start) for start in range(0, tokens, self.page_tokens)]
        keys, values = (
            torch.cat(
                [pair[number][index, :, :size] for pair, (_, index), size in zip(pages, places, sizes, strict=False)],
                dim=1,
            )
            for number in range(2)
        )
        return keys, values

    def fill_gap(self, sequence: int, page: int, tokens: int) -> None:
        """Move the first `tokens` tokens of a sequence of one page to a free page."""
        source = int(self.table[sequence, 0])
        for pair in self._blocks[0].values():
            for tensor in pair:
                tensor[page, :, :tokens] = tensor[source, :, :tokens]
        self.used[source], self.used[page], self.table[sequence, 0] = False, True, page


class KVCache:
    """Keys and values by layer.

    Each prompt is stored once, in one prompt entry, until all of its completions are finished. Each slot has the pages
    of one completion, and of the tokens between the prompt and the completion, if there are any.
    """

    def __init__(
        self,
        slots: int,
        max_tokens: int,
        entries: int,
        longest_prompt: int,
        dtype: torch.dtype,
        page_tokens: int | None = None,
    ) -> None:
        self.dtype, self.whole = dtype, page_tokens is None
        self.completions = PageStore(slots, max_tokens, page_tokens, dtype)
        self.prompts = PageStore(entries, longest_prompt, page_tokens, dtype)
        self.prompt_lengths = np.zeros(entries, dtype=np.int64)
        self.users = np.zeros(entries, dtype=np.int64)  # number of unfinished completions of each prompt
        self._kept_prompts: dict[int, KeptPrompt] = {}  # by entry

    @property
    def free_entries(self) -> list[int]:
        """Prompt entries that no unfinished completion needs."""
        return [int(entry) for entry in np.flatnonzero(self.users == 0)]

    def store_prompts(
        self, layer: Layer, pair: Sequence[Tensor], entries: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Store the keys and values [heads, Σ lengths, D] of prompts for one layer. `lengths` are in tokens."""
        self._describe(layer.index, pair)
        self.prompts.reserve(np.array(entries), np.array(lengths))
        parts = zip(*(tensor.split(list(lengths), dim=1) for tensor in pair), strict=True)
        for entry, part in zip(entries, parts, strict=True):
            self.prompts.store(layer.index, entry, part)

    def _describe(self, layer: int, pair: Sequence[Tensor]) -> None:
        self.completions.describe(layer, pair)
        self.prompts.describe(layer, pair)

    def load_prompt(self, entry: int, prompt: KeptPrompt) -> None:
        """Store the keys and values of a prompt that was kept."""
        for layer, pair in prompt.pairs.items():
            self._describe(layer, pair)
        self.prompts.reserve(np.array([entry]), np.array([len(prompt.token_ids)]))
        self.prompts.restore(entry, prompt.pairs)
        self._kept_prompts[entry] = prompt

    def keep_prompt(self, entry: int, token_ids: tuple[int, ...]) -> KeptPrompt:
        """A copy of the prompt of an entry. All callers get the same one, as long as the prompt is in the entry."""
        if entry not in self._kept_prompts:
            self._kept_prompts[entry] = KeptPrompt(token_ids, self.prompts.copy(entry, len(token_ids)))
        return self._kept_prompts[entry]

    def leave_prompt(self, entry: int) -> bool:
        """One completion of a prompt is finished. The last one frees the prompt's pages. Returns whether it was."""
        self.users[entry] -= 1
        if self.users[entry]:
            return False
        self.prompts.release(entry)
        self._kept_prompts.pop(entry, None)
        return True
