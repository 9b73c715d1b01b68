"""gruppo's attention, plugged into transformers' modules through their attention interface.

A *plan* defines which tokens see which. While a plan is active for a model, the attention calls of the model go to it.
Otherwise the model uses transformers' attention. There is one active plan per model, not per thread, because on some
devices autograd runs backward on threads of its own. Copies of a model can compute on other threads at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from gruppo.models.ops.rope import QKNorm, Rope

NAME = "gruppo"


@dataclass(frozen=True, slots=True)
class Layer:
    """The attention of a layer: softmax(cap · tanh(scale · q·k / cap)) · v over the keys that a query sees.

    `softcap`: the cap (Gemma 2), or None for scale · q·k. `window`: the number of last positions that a query sees,
    including its own, or None for all. `sinks`: one logit per head that takes part in the softmax without a value, or
    None.
    """

    index: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Float[Tensor, " heads"] | None = None


class AttentionPlan(Protocol):
    """Computes the attention of one layer at a time.

    `wide`: whether it takes heads in the accumulation dtype, float32 (or float64). Others take the compute dtype,
    without which kernels of accelerators cannot run.
    """

    @property
    def wide(self) -> bool:
        """See the class."""

    def attend(
        self,
        layer: Layer,
        query: Float[Tensor, "B heads T D"],
        key: Float[Tensor, "B kv_heads T D"],
        value: Float[Tensor, "B kv_heads T E"],
    ) -> Float[Tensor, "B T heads E"]:
        """Return the attention output of every token."""


@runtime_checkable
class ProjectedAttention(Protocol):
    """A plan that can also take projected rows, before they are split into heads and rotary embeddings are applied."""

    def attend_projected(
        self, layer: Layer, projected: Float[Tensor, "N Q+2*K D"], queries: int, rope: Rope, norms: QKNorm
    ) -> Float[Tensor, "N Q*D"] | None:
        """Attention output of each row, in the compute dtype, or None if `attend` must be used.

        See `gruppo.models.ops.rope.apply_rope` for the arguments.
        """


_active: dict[int, AttentionPlan] = {}  # by the identity of the config of the modules


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    plan = _active.get(id(module.config))
    assert plan is not None, "gruppo's attention is selected, but no plan is active"
    index = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = Layer(index, scale, softcap, _window(module, index, sliding_window), s_aux)
    device = query.device.type
    # Rotary embeddings promote queries and keys to float32, and leave values in the compute dtype.
    dtype = torch.promote_types(query.dtype, key.dtype)
    if plan.wide:
        dtype = torch.promote_types(dtype, torch.float32)
    elif torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return plan.attend(layer, query.to(dtype), key.to(dtype), value.to(dtype)), None


def _window(module: torch.nn.Module, index: int, given: int | None) -> int | None:
    """The window of a layer, from the config if it lists layer types, else `given`.

    Some modules pass a window that their mask ignores.
    """
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return given
    return (given or config.sliding_window) if types[index] == "sliding_attention" else None


AttentionInterface.register(NAME, _attention)


def exclude_attention_from_compilation() -> None:
    """Keep torch's compiler out of gruppo's attention."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))


@contextmanager
def attention_plan(configs: Sequence[PreTrainedConfig], plan: AttentionPlan) -> Iterator[None]:
    """Let `plan` compute the attention of the modules with these configs inside the block. Plans of a model do not
    nest."""
    keys = [id(config) for config in configs]
    assert _active.keys().isdisjoint(keys), "an attention plan is already active"
    _active.update(dict.fromkeys(keys, plan))
    try:
        with attention_named(configs, NAME):
            yield
    finally:
        for key in keys:
            del _active[key]


@contextmanager
def attention_named(configs: Sequence[PreTrainedConfig], name: str) -> Iterator[None]:
    """Let the modules with these configs use the attention implementation `name` inside the block."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


class CapturingAttention:
    """An attention plan that records the layers, and their queries, keys and values."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan, self.wide = plan, plan.wide
        self.captured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.layers: list[Layer] = []

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan`; B = 1.

        Raises ValueError for a layer that attends more than once, because its keys would overwrite each other.
        """
        if layer.index in self.captured:
            raise ValueError(f"layer {layer.index} computes attention more than once")
        self.captured[layer.index] = (query[0], key[0], value[0])
        self.layers.append(layer)
        return self.plan.attend(layer, query, key, value)


def soft_capped(scores: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(scores / cap), or the scores themselves without a cap."""
    return scores if cap is None else cap * torch.tanh(scores / cap)
