"""Attention of the native engine: for packed prompts, and for decoding steps over shared prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.engines.native.kv_cache import KVCache
from gruppo.engines.native.layout import DecodingLayout, Piece
from gruppo.models.attention.interface import AttentionPlan, Layer, soft_capped
from gruppo.models.ops.attention import attend_decoding
from gruppo.models.ops.rope import QKNorm, Rope

# Up to this many queries per head, torch's CPU attention kernel takes 1.6 times as long as two matmuls.
FEW_QUERIES = 8

MASKED = -1e30  # finite, so that a row that sees no token of a page gets weight 0 instead of NaN


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

    The token of each live slot attends to its prompt, which is shared between slots, and to what follows the prompt in
    the slot. Attention to each page is normalized separately, then all pages of a row are joined by their log-sum-exps.
    Indices and masks are the same for every layer.

    `lengths`: the tokens of each row behind its prompt, with the one that this step reads; `longest` and `shortest` of
    them.
    """

    def __init__(self, layout: DecodingLayout, lengths: Int[Tensor, " N"], longest: int, shortest: int) -> None:
        self.layout, self.cache, self.device = layout, layout.cache, lengths.device
        self.lengths, self.longest, self.together = lengths, longest, longest == shortest
        self.position = lengths - 1
        self.wide = self.cache.dtype != torch.bfloat16
        self._biases: dict[tuple[int, int | None], Tensor | None] = {}

    def attend_projected(
        self, layer: Layer, projected: Tensor, queries: int, rope: Rope, norms: QKNorm
    ) -> Tensor | None:
        """See `ProjectedAttention`. N is the number of live slots, one row per slot."""
        if layer.softcap is not None or layer.sinks is not None or not self.cache.whole:
            return None
        stores = self.cache.completions.pair(layer.index, 0), self.cache.prompts.pair(layer.index, 0)
        layout = self.layout
        rows = [layout.order, layout.prompt_pages, layout.prompt_lengths, self.position]
        return attend_decoding(projected, queries, rope, norms, layer.scale, layer.window, *stores, rows)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; T = 1."""
        with torch.autocast(self.device.type, enabled=False):
            live, heads, _, width = query.shape
            kv_heads = key.shape[1]
            shared = heads // kv_heads
            self._write(layer, key[:, :, 0].to(self.cache.dtype), value[:, :, 0].to(self.cache.dtype))
            rows = query.to(self.cache.dtype).reshape(live, -1)
            results: list[Tensor] = []
            normalizers: list[Tensor] = []
            for number, piece in enumerate(self.layout.pieces):
                keys, values = piece.store.pair(layer.index, piece.block)
                seen = self._keys(piece)
                own = rows if piece.rows is None else rows.index_select(0, piece.rows)
                own = own.view(piece.pages, piece.per, kv_heads, shared, width).transpose(1, 2)
                result, normalizer = attention_with_lse(
                    own.reshape(piece.pages, kv_heads, piece.per * shared, width),
                    keys[: piece.pages, :, :seen],
                    values[: piece.pages, :, :seen],
                    self._bias(number, piece, layer.window, shared),
                    layer,
                )
                for joined, tensor in ((results, result), (normalizers, normalizer)):
                    by_row = tensor.view(piece.pages, kv_heads, piece.per, shared, -1).transpose(1, 2)
                    joined.append(by_row.reshape(piece.pages * piece.per, heads, -1))
            parts = self.layout.parts
            weights = torch.cat(normalizers)[parts] + self.layout.missing[..., None, None]
            if layer.sinks is not None:
                sinks = layer.sinks.to(weights.dtype).view(1, 1, heads, 1).expand(live, -1, -1, -1)
                weights = torch.cat([weights, sinks], dim=1)
            weights = torch.softmax(weights, dim=1)[:, : parts.shape[1]]
            return (weights * torch.cat(results)[parts]).sum(dim=1).view(live, 1, heads, -1)

    def _write(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        """Store the key and the value of each row's token."""
        page_tokens = self.cache.completions.page_tokens
        for written in self.layout.written:
            for store, tensor in zip(
                self.cache.completions.pair(layer.index, written.block), (key, value), strict=True
            ):
                if written.pages is None and self.together:  # a slice is faster than the equivalent indices
                    store[: len(tensor), :, (self.longest - 1) % page_tokens] = tensor
                    continue
                rows = slice(None) if written.rows is None else written.rows
                pages = torch.arange(len(tensor), device=self.device) if written.pages is None else written.pages
                store[pages, :, self.position[rows] % page_tokens] = tensor[rows]

    def _keys(self, piece: Piece) -> int:
        """The number of keys per page that any row can see."""
        return min(piece.store.page_tokens, self.layout.longest_prompt if piece.of_prompts else self.longest)

    def _bias(self, number: int, piece: Piece, window: int | None, shared: int) -> Tensor | None:
        """Biases added to the scores: 0 for keys that are seen, MASKED for keys that are not. None if all are seen.

        [pages, 1, 1 or queries, keys].
        """
        if window is not None and window >= self.layout.longest_prompt + self.longest:
            window = None
        if (number, window) not in self._biases:
            self._biases[number, window] = self._new_bias(piece, window, shared)
        return self._biases[number, window]

    def _new_bias(self, piece: Piece, window: int | None, shared: int) -> Tensor | None:
        if not piece.of_prompts and self.cache.whole and self.together and window is None:
            return None
        prompts, lengths = (
            (tensor if piece.rows is None else tensor[piece.rows]).view(piece.pages, piece.per)
            for tensor in (self.layout.prompt_lengths, self.lengths)
        )
        ends = (prompts if piece.of_prompts else lengths) - piece.start[:, None]
        key = torch.arange(self._keys(piece), device=self.device)
        if window is None:
            seen = key < ends[:, :1, None]  # all rows of a page see the same
        else:
            begins = (prompts + lengths if piece.of_prompts else lengths) - window - piece.start[:, None]
            seen = (key < ends[..., None]) & (key >= begins[..., None])
            if piece.per > 1:
                seen = seen.repeat_interleave(shared, dim=1)
        dtype = torch.promote_types(self.cache.dtype, torch.float32)
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, MASKED)[:, None]


def attention_with_lse(
    query: Float[Tensor, "B heads Q D"],
    keys: Float[Tensor, "B heads K D"],
    values: Float[Tensor, "B heads K E"],
    bias: Float[Tensor, "..."] | None,
    layer: Layer,
) -> tuple[Float[Tensor, "B heads Q E"], Float[Tensor, "B heads Q"]]:
    """Attention output, and the log-sum-exp of the scores, in the accumulation dtype.

    Uses torch's kernel if it can return both and is faster. bfloat16 is multiplied as it is, and summed in float32.
    """
    plain = layer.softcap is None and query.shape[-1] == values.shape[-1] and query.dtype != torch.bfloat16
    if plain and query.device.type == "cpu" and query.shape[2] > FEW_QUERIES:
        mask = None if bias is None else bias.expand(len(query), 1, query.shape[2], keys.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=layer.scale
        )
        return out, lse
    scores = soft_capped(_product(query, keys.transpose(-1, -2)).mul_(layer.scale), layer.softcap)
    if bias is not None:
        scores += bias
    weights = torch.softmax(scores, dim=-1)
    # Log-sum-exp from the key with the largest weight, which is at least 1 / keys.
    lse = scores.amax(dim=-1) - weights.amax(dim=-1).log_()
    return _product(weights.to(values.dtype), values), lse


def _product(one: Float[Tensor, "B heads N D"], other: Float[Tensor, "B heads D M"]) -> Float[Tensor, "B heads N M"]:
    """Matrix products in the accumulation dtype."""
    if one.dtype != torch.bfloat16:
        return one @ other
    if one.device.type != "cuda":
        return one.float() @ other.float()
    product: Tensor = torch.bmm(one.flatten(0, 1), other.flatten(0, 1), out_dtype=torch.float32)
    return product.view(*one.shape[:2], *product.shape[1:])
