"""Attention over packed groups with a kernel for sequences of different lengths (flash attention), on CUDA."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gruppo.models.attention.interface import Layer
from gruppo.models.attention.sequences import Layout, Repeat, prompt_and_completions
from gruppo.utils.transfer import upload


@dataclass(frozen=True)
class Lengths:
    """Where sequences begin and end in packed queries, and in packed keys and values.

    `query_ends`, `key_ends`: 0 and the end of each sequence, int32. `longest_query`, `longest_key`: in tokens. A
    sequence has at least as many keys as queries; its last query is at the position of its last key.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


# (queries [N, heads, D], keys [M, kv_heads, D], values [M, kv_heads, E], lengths, layer) -> [N, heads, E].
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Lengths, Layer], Tensor]


class VarlenAttention:
    """Attention over a packed row of groups; see `SharedPrefixAttention` for what each token sees.

    Every prompt and every completion is a sequence. The queries of a completion are its own tokens, so no query is
    repeated. Its keys and values are those of its prompt and its own: these are repeated, once per completion.
    """

    wide = False

    def __init__(self, groups: Layout, device: torch.device, kernel: VarlenKernel | None = None) -> None:
        """`kernel`: by default that of flash-attn or of torch, which need CUDA and 16-bit numbers."""
        queries: list[int] = []
        sequences = []
        for prompt, completions in prompt_and_completions(groups):
            sequences += [prompt, *(np.concatenate([prompt, completion]) for completion in completions)]
            queries += [len(prompt), *map(len, completions)]
        keys = [len(sequence) for sequence in sequences]
        query_ends, key_ends = upload([np.cumsum([0, *queries]), np.cumsum([0, *keys])], torch.int32, device)
        self.lengths = Lengths(query_ends, key_ends, max(queries), max(keys))
        self.repeat = Repeat(np.concatenate(sequences), sum(queries), device)
        self.kernel = kernel or varlen_kernel()

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1."""
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.kernel(query, self.repeat(key), self.repeat(value), self.lengths, layer)[None]


@cache
def varlen_kernel() -> VarlenKernel:
    """The kernel of flash-attn if it is installed, else that of torch. Raises ImportError if there is neither."""
    try:
        return _flash_kernel(importlib.import_module("flash_attn").flash_attn_varlen_func)
    except ImportError:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if {"window_size", "enable_gqa"} <= inspect.signature(attend).parameters.keys():
        return _torch_kernel(attend)
    raise ImportError(f"torch {torch.__version__} has no varlen attention with windows and grouped heads")


def _window(layer: Layer) -> tuple[int, int]:
    """The numbers of positions that a query sees before and after its own; -1: all."""
    return (-1 if layer.window is None else layer.window - 1), 0


def _flash_kernel(attend: Callable[..., Tensor]) -> VarlenKernel:
    def kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, layer: Layer) -> Tensor:
        if layer.sinks is not None:
            raise ValueError("flash-attn has no attention sinks")
        return attend(
            query, key, value, lengths.query_ends, lengths.key_ends, lengths.longest_query, lengths.longest_key,
            softmax_scale=layer.scale, causal=True, window_size=_window(layer), softcap=layer.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return kernel


def _torch_kernel(attend: Callable[..., Any]) -> VarlenKernel:
    def kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, layer: Layer) -> Tensor:
        if layer.softcap is not None or layer.sinks is not None:
            raise ValueError("torch's varlen attention has no soft cap and no sinks")
        output: Tensor = attend(
            query, key, value, lengths.query_ends, lengths.key_ends, lengths.longest_query, lengths.longest_key,
            scale=layer.scale, window_size=_window(layer), enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
        return output

    return kernel
