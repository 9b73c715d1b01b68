"""Keys and values of prompts, which their completions share, and of the completions themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gruppo.models.attention.interface import Layer


class KVCache:
    """Keys and values by layer, in the dtype that sums are computed in: float32 (float64 in proofs).

    Each prompt is stored once, in a place of its own, for as long as a completion of it is not finished. Each slot has
    room for the tokens of one completion.
    """

    def __init__(self, slots: int, max_tokens: int, places: int, longest_prompt: int, dtype: torch.dtype) -> None:
        self.slots, self.max_tokens = slots, max_tokens
        self.longest_prompt, self.dtype = longest_prompt, dtype
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompt_lengths = np.zeros(places, dtype=np.int64)
        self.users = np.zeros(places, dtype=np.int64)  # completions of each place's prompt that are not finished

    @property
    def free_places(self) -> list[int]:
        """Places whose prompt nobody needs any more."""
        return [int(place) for place in np.flatnonzero(self.users == 0)]

    def store_prompts(
        self, layer: Layer, pair: Sequence[Tensor], places: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Store a layer's keys and values [heads, Σ lengths, D] of prompts."""
        if layer.index not in self.own:
            self.own[layer.index] = self._room(pair, self.slots, self.max_tokens)
            self.prompts[layer.index] = self._room(pair, len(self.users), self.longest_prompt)
        for store, each in zip(self.prompts[layer.index], pair, strict=True):
            for place, length, part in zip(places, lengths, each.split(list(lengths), dim=1), strict=True):
                store[place, :, :length] = part

    def _room(self, pair: Sequence[Tensor], rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.zeros(rows, len(each), tokens, each.shape[-1], dtype=self.dtype, device=each.device) for each in pair
        )
        return keys, values

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one slot to another."""
        for pair in self.own.values():
            for store in pair:
                store[target, :, :tokens] = store[source, :, :tokens]
