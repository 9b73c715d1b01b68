"""gruppo's own attention, plugged into transformers' modules through their attention interface.

A *plan* says which tokens see which. While a plan is active the model's attention calls go to it; outside, the model
is as transformers made it. The plan is one object for the whole process (autograd runs backward on threads of its
own on some devices, so it cannot be a thread's).
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
    """What a layer's attention computes: softmax(cap · tanh(scale · q·k / cap)) · v over the keys that are seen.

    `softcap`: the cap (Gemma 2), or None for scale · q·k alone. `window`: a query sees this many last positions, its
    own included, or None for all. `sinks`: a logit a head that takes part in the softmax and has no value, or None.
    """

    index: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Float[Tensor, " heads"] | None = None


class AttentionPlan(Protocol):
    """Computes attention for one layer."""

    def attend(
        self,
        layer: Layer,
        query: Float[Tensor, "B heads T D"],
        key: Float[Tensor, "B kv_heads T D"],
        value: Float[Tensor, "B kv_heads T E"],
    ) -> Float[Tensor, "B T heads E"]:
        """Attention output of every token."""


@runtime_checkable
class ProjectedAttention(Protocol):
    """A plan that can also take what a layer's product made of its rows, before it is cut into heads and turned."""

    def attend_projected(
        self, layer: Layer, projected: Float[Tensor, "N Q+2*K D"], queries: int, rope: Rope, norms: QKNorm
    ) -> Float[Tensor, "N Q*D"] | None:
        """Attention output of each row, in the dtype of products; None where `attend` has to do it. See
        `gruppo.models.ops.rope.apply_rope`."""


_active: AttentionPlan | None = None


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
    assert _active is not None, "the attention of gruppo is set but no plan is active"
    index = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = Layer(index, scale, softcap, _window(module, index, sliding_window), s_aux)
    if query.device.type != "cpu":
        return _active.attend(layer, query, key, value), None
    # torch's attention on a CPU is quicker in float32 than in bfloat16, forward and backward.
    with torch.autocast("cpu", enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        return _active.attend(layer, query.to(wide), key.to(wide), value.to(wide)), None


def _window(module: torch.nn.Module, index: int, given: int | None) -> int | None:
    """The config says which layers slide, where it lists them: some modules pass a window that their mask ignores."""
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return given
    return (given or config.sliding_window) if types[index] == "sliding_attention" else None


AttentionInterface.register(NAME, _attention)


@contextmanager
def attention_plan(configs: Sequence[PreTrainedConfig], plan: AttentionPlan) -> Iterator[None]:
    """Let `plan` do the attention of the modules with these configs inside the block; plans do not nest."""
    global _active
    assert _active is None, "an attention plan is active already"
    _active = plan
    try:
        with attention_named(configs, NAME):
            yield
    finally:
        _active = None


@contextmanager
def attention_named(configs: Sequence[PreTrainedConfig], name: str) -> Iterator[None]:
    """Let the modules with these configs compute attention by that implementation inside the block."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, held in zip(configs, before, strict=True):
            config._attn_implementation = held


def soft_capped(scores: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(scores / cap); the scores themselves where there is no cap."""
    return scores if cap is None else cap * torch.tanh(scores / cap)
