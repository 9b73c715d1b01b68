"""Attention of the native engine: for packed prompts, and for decoding steps over shared prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.engines.native.kv_cache import KVCache
from gruppo.engines.native.scheduler import Scheduler
from gruppo.models.attention.interface import AttentionPlan, Layer, soft_capped
from gruppo.models.ops.attention import attend_decoding
from gruppo.models.ops.rope import QKNorm, Rope

# Up to this many queries per head, torch's CPU attention kernel takes 1.6 times as long as two matmuls.
FEW_QUERIES = 8


MASKED = -1e30  # finite, so that a row that sees no token of its prompt gets weight 0 instead of NaN


class PromptAttention:
    """Attention over packed prompts, computed by `plan`. Their keys and values are stored in the cache."""

    def __init__(self, plan: AttentionPlan, cache: KVCache, entries: Sequence[int], lengths: Sequence[int]) -> None:
        self.plan, self.wide = plan, plan.wide
        self.cache, self.entries, self.lengths = cache, entries, lengths

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        self.cache.store_prompts(layer, (key[0], value[0]), self.entries, self.lengths)
        return self.plan.attend(layer, query, key, value)


class DecodingAttention:
    """The attention plan of one decoding step.

    The token of each live slot attends to its prompt, which is shared between slots, and to its own completion. Indices
    and masks are the same for every layer.
    """

    wide = True  # as the cache

    def __init__(self, scheduler: Scheduler, device: torch.device) -> None:
        self.cache, self.device, self.live = scheduler.cache, device, scheduler.live
        live = scheduler.live
        length, entry_of = scheduler.length[:live], scheduler.entry[:live]
        entries, group = np.unique(entry_of, return_inverse=True)
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(len(entries)))
        rank = np.empty(live, dtype=np.int64)  # of the completion among those of its prompt
        rank[order] = np.arange(live) - starts[group[order]]
        rows = np.zeros((len(entries), int(rank.max()) + 1), dtype=np.int64)
        rows[group, rank] = np.arange(live)
        lengths = self.cache.prompt_lengths[entries]
        indices = (order, entry_of, self.cache.prompt_lengths[entry_of], length - 1)
        self.row_numbers = [torch.as_tensor(array, device=device) for array in indices]
        self.rows_of_entry = torch.as_tensor(rows, device=device)
        self.flat_index = torch.as_tensor(group * rows.shape[1] + rank, device=device)
        self.longest_prefix, self.longest_completion = int(lengths.max()), int(length.max())
        self.seen_lengths = torch.as_tensor(length, device=device)
        self.seen_prefixes = torch.as_tensor(self.cache.prompt_lengths[entry_of], device=device)
        self.rows = torch.arange(live, device=device)
        self.position = self.seen_lengths - 1
        # Slices where possible: they are faster than the equivalent indices.
        together = length.min() == length.max()
        self.written = (
            (slice(live), slice(None), int(length[0]) - 1) if together else (self.rows, slice(None), self.position)
        )
        whole = len(entries) == int(entries[-1]) + 1
        self.entries = slice(len(entries)) if whole else torch.as_tensor(entries, device=device)
        self.biases: dict[tuple[int | None, int], tuple[Tensor | None, Tensor]] = {}
        self.together = bool(together)
        self.dense = bool((rows.ravel() == np.arange(live)).all()) if rows.size == live else False

    def _bias(self, window: int | None, shared: int) -> tuple[Tensor | None, Tensor]:
        """Biases added to the scores: 0 for keys that are seen, MASKED for keys that are not.

        Returns the bias of completion keys [live, 1, 1, longest], None if all are seen, and of prompt keys
        [entries, 1, slots per entry · shared or 1, longest].
        """
        if window is not None and window >= self.longest_prefix + self.longest_completion:
            window = None
        if (window, shared) not in self.biases:
            completion_key = torch.arange(self.longest_completion, device=self.device)
            key = torch.arange(self.longest_prefix, device=self.device)
            completion = completion_key < self.seen_lengths[:, None]
            prefix = key < self.seen_prefixes[:, None]
            if window is not None:
                completion &= completion_key > (self.position - window)[:, None]
                prefix &= key > (self.seen_prefixes + self.position - window)[:, None]
            if window is None:  # all slots of an entry see the same
                by_entry = prefix[self.rows_of_entry[:, :1]]
            else:
                by_entry = prefix[self.rows_of_entry].repeat_interleave(shared, dim=1)
            whole = self.together and window is None
            completion_bias = None if whole else self._penalty(completion[:, None, None])
            self.biases[window, shared] = completion_bias, self._penalty(by_entry[:, None])
        return self.biases[window, shared]

    def _penalty(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.cache.dtype, device=seen.device).masked_fill_(~seen, MASKED)

    def attend_projected(
        self, layer: Layer, projected: Tensor, queries: int, rope: Rope, norms: QKNorm
    ) -> Tensor | None:
        """See `ProjectedAttention`. N is the number of live slots, one row per slot."""
        if layer.softcap is not None or layer.sinks is not None:
            return None
        stores = self.cache.completions[layer.index], self.cache.prompts[layer.index]
        return attend_decoding(projected, queries, rope, norms, layer.scale, layer.window, *stores, self.row_numbers)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; T = 1.

        Attention over the shared prompt and over the completion are normalized separately, then joined by their
        log-sum-exps.
        """
        with torch.autocast(self.device.type, enabled=False):
            live, heads, _, width = query.shape
            kv_heads = key.shape[1]
            shared = heads // kv_heads
            completion_keys, completion_values = self.cache.completions[layer.index]
            prefix_keys, prefix_values = self.cache.prompts[layer.index]
            completion_keys[self.written] = key[:, :, 0].to(self.cache.dtype)
            completion_values[self.written] = value[:, :, 0].to(self.cache.dtype)
            completion_bias, prefix_bias = self._bias(layer.window, shared)
            query = query.to(self.cache.dtype)
            completion, completion_lse = attention_with_lse(
                query.reshape(live, kv_heads, shared, width),
                completion_keys[:live, :, : self.longest_completion],
                completion_values[:live, :, : self.longest_completion],
                completion_bias,
                layer,
            )
            entries, per_entry = self.rows_of_entry.shape
            grouped = query.reshape(live, -1)
            if not self.dense:
                grouped = grouped.index_select(0, self.rows_of_entry.view(-1))
            grouped = grouped.view(entries, per_entry, kv_heads, shared, width).transpose(1, 2)
            out, lse = attention_with_lse(
                grouped.reshape(entries, kv_heads, per_entry * shared, width),
                prefix_keys[self.entries, :, : self.longest_prefix],
                prefix_values[self.entries, :, : self.longest_prefix],
                prefix_bias,
                layer,
            )
            out, lse = (
                tensor.view(entries, kv_heads, per_entry, -1).transpose(1, 2).reshape(entries * per_entry, -1)
                for tensor in (out, lse)
            )
            if not self.dense:
                out, lse = out.index_select(0, self.flat_index), lse.index_select(0, self.flat_index)
            out, lse = out.view(completion.shape), lse.view(completion_lse.shape)
            joint = torch.lerp(out, completion, torch.sigmoid(completion_lse - lse).unsqueeze(-1))
            if layer.sinks is not None:
                sinks = layer.sinks.to(self.cache.dtype).view(1, kv_heads, shared)
                joint = joint * torch.sigmoid(torch.logaddexp(completion_lse, lse) - sinks).unsqueeze(-1)
            return joint.view(live, 1, heads, -1)


def attention_with_lse(
    query: Float[Tensor, "B heads Q D"],
    keys: Float[Tensor, "B heads K D"],
    values: Float[Tensor, "B heads K E"],
    bias: Float[Tensor, "..."] | None,
    layer: Layer,
) -> tuple[Float[Tensor, "B heads Q E"], Float[Tensor, "B heads Q"]]:
    """Attention output, and the log-sum-exp of the scores.

    Uses torch's kernel if it can return both and is faster.
    """
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
    # Log-sum-exp from the key with the largest weight, which is at least 1 / keys.
    return weights @ values, scores.amax(dim=-1) - weights.amax(dim=-1).log_()
