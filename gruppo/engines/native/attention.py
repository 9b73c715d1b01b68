"""Attention of the native engine: of prompts side by side, and of one decoding step over shared prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.engines.native.kv_cache import KVCache
from gruppo.engines.native.scheduler import Scheduler
from gruppo.models.attention.interface import Layer, soft_capped
from gruppo.models.attention.shared_prefix import SharedPrefixAttention
from gruppo.models.ops.attention import attend_decoding
from gruppo.models.ops.rope import QKNorm, Rope

FEW_QUERIES = 8  # of a head: torch's attention kernel on a CPU is made for more, and 1.6 times as slow as two products


MASKED = -1e30  # finite, so that a row that sees nothing of its prompt has no NaN and no weight


class PromptAttention(SharedPrefixAttention):
    """Prompts side by side, each seeing itself alone; their keys and values go to the cache as they are computed."""

    def __init__(self, cache: KVCache, places: Sequence[int], lengths: Sequence[int]) -> None:
        super().__init__([(length, ()) for length in lengths])
        self.cache, self.places, self.lengths = cache, places, lengths

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        self.cache.store_prompts(layer, (key[0], value[0]), self.places, self.lengths)
        return super().attend(layer, query, key, value)


class DecodingAttention:
    """The attention plan of one decoding step: one token of every live slot, over the prompt that the slot shares and
    over its own tokens. Indices and masks are the same for every layer."""

    def __init__(self, scheduler: Scheduler, device: torch.device) -> None:
        self.cache, self.device, self.live = scheduler.cache, device, scheduler.live
        live = scheduler.live
        length, place_of = scheduler.length[:live], scheduler.place[:live]
        places, member = np.unique(place_of, return_inverse=True)
        order = np.argsort(member, kind="stable")
        starts = np.searchsorted(member[order], np.arange(len(places)))
        seat = np.empty(live, dtype=np.int64)
        seat[order] = np.arange(live) - starts[member[order]]
        rows = np.zeros((len(places), int(seat.max()) + 1), dtype=np.int64)
        rows[member, seat] = np.arange(live)
        lengths = self.cache.prompt_lengths[places]
        at = (order, place_of, self.cache.prompt_lengths[place_of], length - 1)
        self.row_numbers = [torch.as_tensor(each, device=device) for each in at]
        self.rows_of_place = torch.as_tensor(rows, device=device)
        self.seated = torch.as_tensor(member * rows.shape[1] + seat, device=device)
        self.longest_prefix, self.longest_own = int(lengths.max()), int(length.max())
        self.seen_lengths = torch.as_tensor(length, device=device)
        self.seen_prefixes = torch.as_tensor(self.cache.prompt_lengths[place_of], device=device)
        self.rows = torch.arange(live, device=device)
        self.position = self.seen_lengths - 1
        # A slice where an index would do the same, but slower.
        begun = length
        together = begun.min() == begun.max()
        self.written = (
            (slice(live), slice(None), int(begun[0]) - 1) if together else (self.rows, slice(None), self.position)
        )
        whole = len(places) == int(places[-1]) + 1
        self.places = slice(len(places)) if whole else torch.as_tensor(places, device=device)
        self.biases: dict[tuple[int | None, int], tuple[Tensor | None, Tensor]] = {}
        self.together = bool(together)
        self.dense = bool((rows.ravel() == np.arange(live)).all()) if rows.size == live else False

    def _bias(self, window: int | None, shared: int) -> tuple[Tensor | None, Tensor]:
        """What is added to the scores of own keys [live, 1, 1, longest], None where all are seen, and of prompt keys
        [places, 1, seats · shared or 1, longest]: 0 where a key is seen, a number below every score where not."""
        if window is not None and window >= self.longest_prefix + self.longest_own:
            window = None
        if (window, shared) not in self.biases:
            own_key = torch.arange(self.longest_own, device=self.device)
            key = torch.arange(self.longest_prefix, device=self.device)
            own = own_key < self.seen_lengths[:, None]
            prefix = key < self.seen_prefixes[:, None]
            if window is not None:
                own &= own_key > (self.position - window)[:, None]
                prefix &= key > (self.seen_prefixes + self.position - window)[:, None]
            if window is None:  # the seats of a place see the same
                by_place = prefix[self.rows_of_place[:, :1]]
            else:
                by_place = prefix[self.rows_of_place].repeat_interleave(shared, dim=1)
            whole = self.together and window is None
            own_bias = None if whole else self._penalty(own[:, None, None])
            self.biases[window, shared] = own_bias, self._penalty(by_place[:, None])
        return self.biases[window, shared]

    def _penalty(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.cache.dtype, device=seen.device).masked_fill_(~seen, MASKED)

    def attend_projected(
        self, layer: Layer, projected: Tensor, queries: int, rope: Rope, norms: QKNorm
    ) -> Tensor | None:
        """See `ProjectedAttention`; N is a row a completion in flight."""
        if layer.softcap is not None or layer.sinks is not None:
            return None
        stores = self.cache.own[layer.index], self.cache.prompts[layer.index]
        return attend_decoding(projected, queries, rope, norms, layer.scale, layer.window, *stores, self.row_numbers)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; T = 1. Attention over the shared prompt and over the completion's own tokens, each
        normalised by itself, joined by their log-sum-exps."""
        with torch.autocast(self.device.type, enabled=False):
            live, heads, _, width = query.shape
            kv_heads = key.shape[1]
            shared = heads // kv_heads
            own_keys, own_values = self.cache.own[layer.index]
            prefix_keys, prefix_values = self.cache.prompts[layer.index]
            own_keys[self.written] = key[:, :, 0].to(self.cache.dtype)
            own_values[self.written] = value[:, :, 0].to(self.cache.dtype)
            own_bias, prefix_bias = self._bias(layer.window, shared)
            query = query.to(self.cache.dtype)
            own, own_lse = attention_with_lse(
                query.reshape(live, kv_heads, shared, width),
                own_keys[:live, :, : self.longest_own],
                own_values[:live, :, : self.longest_own],
                own_bias,
                layer,
            )
            places, seats = self.rows_of_place.shape
            grouped = query.reshape(live, -1)
            if not self.dense:
                grouped = grouped.index_select(0, self.rows_of_place.view(-1))
            grouped = grouped.view(places, seats, kv_heads, shared, width).transpose(1, 2)
            out, lse = attention_with_lse(
                grouped.reshape(places, kv_heads, seats * shared, width),
                prefix_keys[self.places, :, : self.longest_prefix],
                prefix_values[self.places, :, : self.longest_prefix],
                prefix_bias,
                layer,
            )
            out, lse = (
                each.view(places, kv_heads, seats, -1).transpose(1, 2).reshape(places * seats, -1)
                for each in (out, lse)
            )
            if not self.dense:
                out, lse = out.index_select(0, self.seated), lse.index_select(0, self.seated)
            out, lse = out.view(own.shape), lse.view(own_lse.shape)
            joint = torch.lerp(out, own, torch.sigmoid(own_lse - lse).unsqueeze(-1))
            if layer.sinks is not None:
                sinks = layer.sinks.to(self.cache.dtype).view(1, kv_heads, shared)
                joint = joint * torch.sigmoid(torch.logaddexp(own_lse, lse) - sinks).unsqueeze(-1)
            return joint.view(live, 1, heads, -1)


def attention_with_lse(
    query: Float[Tensor, "B heads Q D"],
    keys: Float[Tensor, "B heads K D"],
    values: Float[Tensor, "B heads K E"],
    bias: Float[Tensor, "..."] | None,
    layer: Layer,
) -> tuple[Float[Tensor, "B heads Q E"], Float[Tensor, "B heads Q"]]:
    """Attention and the log-sum-exp of its scores, by torch's kernel where that gives both and is the quicker way."""
    plain = layer.softcap is None and query.shape[-1] == values.shape[-1]
    if plain and query.device.type == "cpu" and query.shape[2] > FEW_QUERIES:
        mask = None if bias is None else bias.expand(len(query), 1, query.shape[2], keys.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=layer.scale
        )
        return out, lse
    scores = soft_capped((query * layer.scale) @ keys.transpose(-1, -2), layer.softcap)
    if bias is not None:
        scores += bias
    weights = torch.softmax(scores, dim=-1)
    # The log-sum-exp at the likeliest key, whose weight is at least 1 / keys.
    return weights @ values, scores.amax(dim=-1) - weights.amax(dim=-1).log_()
