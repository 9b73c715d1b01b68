"""Key-value cache: prompts, shared by their completions, and the completions themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gruppo.models.attention.interface import Layer


class KVCache:
    """Keys and values by layer, in the accumulation dtype: float32, or float64 for a float64 policy.

    Each prompt is stored once, in one prompt entry, until all of its completions are finished. Each slot has room for
    the tokens of one completion.
    """

    def __init__(self, slots: int, max_tokens: int, entries: int, longest_prompt: int, dtype: torch.dtype) -> None:
        self.slots, self.max_tokens = slots, max_tokens
        self.longest_prompt, self.dtype = longest_prompt, dtype
        self.completions: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompt_lengths = np.zeros(entries, dtype=np.int64)
        self.users = np.zeros(entries, dtype=np.int64)  # number of unfinished completions of each prompt

    @property
    def free_entries(self) -> list[int]:
        """Prompt entries that no unfinished completion needs."""
        return [int(entry) for entry in np.flatnonzero(self.users == 0)]

    def store_prompts(
        self, layer: Layer, pair: Sequence[Tensor], entries: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Store the keys and values [heads, Σ lengths, D] of prompts for one layer. `lengths` are in tokens."""
        if layer.index not in self.completions:
            self.completions[layer.index] = self._allocate(pair, self.slots, self.max_tokens)
            self.prompts[layer.index] = self._allocate(pair, len(self.users), self.longest_prompt)
        for store, tensor in zip(self.prompts[layer.index], pair, strict=True):
            for entry, length, part in zip(entries, lengths, tensor.split(list(lengths), dim=1), strict=True):
                store[entry, :, :length] = part

    def _allocate(self, pair: Sequence[Tensor], rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.zeros(rows, len(tensor), tokens, tensor.shape[-1], dtype=self.dtype, device=tensor.device)
            for tensor in pair
        )
        return keys, values

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of slot `source` to slot `target`."""
        for pair in self.completions.values():
            for store in pair:
                store[target, :, :tokens] = store[source, :, :tokens]
