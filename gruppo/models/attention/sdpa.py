"""Attention over packed groups with torch's scaled_dot_product_attention, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gruppo.models.attention.interface import Layer, soft_capped
from gruppo.models.attention.sequences import Layout, Places, Repeat, prompt_and_completions


@dataclass(frozen=True)
class _Rows:
    """`count` sequences, padded on the right to `length` tokens."""

    count: int
    length: int

    @property
    def places(self) -> int:
        return self.count * self.length


class SdpaAttention:
    """Attention over a packed row of groups; see `SharedPrefixAttention` for what each token sees.

    Each completion is a row of its own behind a copy of its prompt, and a prompt without completions is a row. Rows are
    padded on the right, where causal attention sees nothing, so layers that see everything need no mask. The price:
    scores of a prompt are computed once per completion. Rows whose lengths differ by more than a factor of two are not
    padded to each other.

    Layers whose window is shorter than a row have a mask that all rows share. For soft caps and sinks, which torch's
    kernel does not know, scores are computed in the accumulation dtype, and again in backward.
    """

    wide = False

    def __init__(self, groups: Layout, device: torch.device, explicit: bool = False) -> None:
        """`explicit`: compute the scores of every layer, without torch's kernel."""
        sequences = [
            sequence
            for prompt, completions in prompt_and_completions(groups)
            for sequence in ([np.concatenate([prompt, completion]) for completion in completions] or [prompt])
        ]
        self.rows: list[_Rows] = []
        sources: list[Places] = []
        real: list[np.ndarray] = []
        # Lengths in [2ⁿ, 2ⁿ⁺¹) are padded to the longest of them.
        ordered = sorted(sequences, key=len)
        for _, members in groupby(ordered, key=lambda sequence: len(sequence).bit_length()):
            together = list(members)
            longest = len(together[-1])
            self.rows.append(_Rows(len(together), longest))
            sources += [np.pad(sequence, (0, longest - len(sequence)), "edge") for sequence in together]
            real += [np.arange(longest) < len(sequence) for sequence in together]
        source, counts = np.concatenate(sources), np.concatenate(real)
        tokens = int(source.max()) + 1
        # Outputs are read at the first place of each token, so only there a query has a gradient.
        places = np.flatnonzero(counts)
        owners = np.zeros(len(source), dtype=bool)
        owners[places[np.unique(source[places], return_index=True)[1]]] = True
        self.queries = Repeat(source, tokens, device, owners)
        self.keys = Repeat(source, tokens, device, counts)
        self.explicit, self._masks = explicit, dict[tuple[int, int | None], Tensor]()

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        sizes = [rows.places for rows in self.rows]
        parts = (self.queries(query).split(sizes), self.keys(key).split(sizes), self.keys(value).split(sizes))
        outputs = []
        for rows, *heads in zip(self.rows, *parts, strict=True):
            q, k, v = (part.unflatten(0, (rows.count, rows.length)).transpose(1, 2) for part in heads)
            outputs.append(self._attend(layer, q, k, v).transpose(1, 2).flatten(0, 1))
        return self.queries.first_places(torch.cat(outputs))[None]

    def _attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of rows [rows, heads, T, D]."""
        length = query.shape[2]
        if self.explicit or layer.softcap is not None or layer.sinks is not None:
            mask = self._mask(length, layer.window, query.device)
            output: Tensor = checkpoint(
                _from_scores, layer, query, key, value, mask, use_reentrant=False, preserve_rng_state=False
            )
            return output
        whole = layer.window is None or length <= layer.window
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if whole else self._mask(length, layer.window, query.device),
            is_causal=whole,
            scale=layer.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _mask(self, length: int, window: int | None, device: torch.device) -> Tensor:
        """The keys that each query of a row sees [T, T]."""
        if (length, window) not in self._masks:
            position = torch.arange(length, device=device)
            before = position[:, None] - position
            self._masks[length, window] = (before >= 0) & (before < (length if window is None else window))
        return self._masks[length, window]


def _from_scores(layer: Layer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of rows from their scores. Query heads that share a key head are stacked: keys are not repeated."""
    rows, heads, length, width = query.shape
    stacked = rows, key.shape[1], heads // key.shape[1], length
    q, k, v = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (query, key, value))
    scores = (q.reshape(*stacked[:2], -1, width) * layer.scale) @ k.transpose(-1, -2)
    scores = soft_capped(scores, layer.softcap).view(*stacked, length).masked_fill(~mask, -torch.inf)
    if layer.sinks is None:
        shares = torch.softmax(scores, dim=-1)
    else:
        sinks = layer.sinks.to(scores.dtype).view(1, *stacked[1:3], 1, 1).expand(*stacked, 1)
        shares = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    output = shares.flatten(2, 3) @ v
    return output.view(rows, heads, length, -1).to(value.dtype)
