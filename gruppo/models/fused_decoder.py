"""The layers of the Llama family written out: fused products, hand-written gradients, few tensors kept for backward.

It stands in for transformers' modules where a trial shows that it gives their numbers (`models.wrap_model`); all else
runs through the modules themselves. Products run in the dtype of the policy on weights that are prepared once for as
long as they do not change; everything between them is float32 (float64 in proofs), as under autocast.

The gradient of a weight is added to its `.grad` as soon as it is made, so that it never waits in memory for the rest
of the backward pass: `backward()` gives all gradients, `torch.autograd.grad` with respect to weights gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

from gruppo.models.attention.interface import AttentionPlan, Layer, ProjectedAttention
from gruppo.models.generation import Generation
from gruppo.models.ops.linear import packed, product
from gruppo.models.ops.norm import add_norm, norm_backward
from gruppo.models.ops.rope import QKNorm, Rope, apply_rope, apply_rope_backward
from gruppo.models.ops.swiglu import gate, gate_backward

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class Cast:
    """A weight in another dtype, cast again when weights have changed."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._state: object = None
        self._made: Tensor | None = None

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight itself where it has that dtype."""
        state = self.generation.number, dtype
        if self._made is None or state != self._state:
            self._made = None  # freed before the new one is made
            self._state, self._made = state, weight.detach().to(dtype)
        return self._made


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers that read the same rows, as one product: their weights stacked, in the dtype of products."""

    modules: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, modules: Sequence[Any], weight_of: Callable[[Any], Tensor], dtype: torch.dtype, pack: bool) -> Linear:
        """Prepared from what the modules hold now."""
        with torch.no_grad():
            rows = [module.out_features for module in modules]
            if len(modules) == 1:
                weight = weight_of(modules[0]).detach().to(dtype)
            else:
                first = modules[0].weight
                weight = torch.empty(sum(rows), first.shape[1], dtype=dtype, device=first.device)
                for part, module in zip(weight.split(rows), modules, strict=True):
                    part.copy_(weight_of(module))
            bias = None
            if any(module.bias is not None for module in modules):
                held = [
                    weight.new_zeros(size) if m.bias is None else m.bias for m, size in zip(modules, rows, strict=True)
                ]
                bias = torch.cat(held).to(dtype)
            return cls(tuple(modules), packed(weight) if pack else weight, bias)

    def __call__(self, rows: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """rows · weightᵀ + bias."""
        return product(rows, self.weight, self.bias)

    def backward(self, grad: Float[Tensor, "N O"], rows: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Adds the gradients of weights and biases; returns that of the rows."""
        start = 0
        made = grad.T @ rows
        sums = None if self.bias is None else grad.sum(dim=0)
        for module in self.modules:
            end = start + module.weight.shape[0]
            accumulate(module.weight, made[start:end])
            if sums is not None and module.bias is not None:
                accumulate(module.bias, sums[start:end])
            start = end
        return grad @ self.weight


@dataclass(frozen=True)
class _Prepared:
    """A layer with its weights as products read them."""

    layer: Layer
    block: Any
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.block.parameters())

    @property
    def products(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return self.qkv.weight.dtype

    @cached_property
    def queries(self) -> int:
        """Heads of queries."""
        return int(self.block.self_attn.q_proj.out_features // self.block.self_attn.head_dim)

    @cached_property
    def norms(self) -> QKNorm:
        """Of each query's and key's head, where they have any."""
        attention = self.block.self_attn
        if not hasattr(attention, "q_norm"):
            return None, None, 0.0
        query, key = attention.q_norm, attention.k_norm
        return query.weight.detach(), key.weight.detach(), query.variance_epsilon


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add to the parameter's gradient, in the dtype of the parameter."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        parameter.grad.add_(gradient)


def _linear(block: Any) -> tuple[list[Any], ...]:
    """The linear layers of a block, those that read the same rows together, in the order of `_Prepared`."""
    attention, mlp = block.self_attn, block.mlp
    return (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )


class FusedBody:
    """A decoder of the Llama family: what its module computes, from token ids to the last hidden states."""

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[Layer],
        generation: Generation,
        weight_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """`layers`: what each layer's attention computes, in order. `generation`: of the decoder's weights. `weight_of`: the weight of a linear layer where
        that is not its own (an adapter is merged); such a body computes, but gives no gradients."""
        self.decoder: Any = decoder
        self.layers, self.generation = list(layers), generation
        self.weight_of, self.trains = weight_of or (lambda module: module.weight), weight_of is None
        self._state: object = None
        self._prepared: list[_Prepared] = []
        self._frozen = False

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether the decoder is built of the parts that are written out here; a trial has to show the rest."""
        blocks = getattr(decoder, "layers", [])
        if not blocks or any(type(block).__name__ not in _LAYERS for block in blocks):
            return False
        linear = [module for block in blocks for name, module in block.named_modules() if name.endswith("_proj")]
        rotary = decoder.rotary_emb.inv_freq.numel() * 2 == blocks[0].self_attn.head_dim
        activations = {type(block.mlp.act_fn) for block in blocks}
        return rotary and activations <= {nn.SiLU, SiLUActivation} and all(type(each) is nn.Linear for each in linear)

    def prepare(self, dtype: torch.dtype, pack: bool) -> list[_Prepared]:
        """The layers with their weights in the dtype of products: made again when a weight has changed."""
        state = dtype, pack, self.generation.number
        if state != self._state and not self._frozen:
            self._prepared = []  # freed before the new ones are made
            self._prepared = [
                _Prepared(layer, block, *(Linear.of(part, self.weight_of, dtype, pack) for part in _linear(block)))
                for layer, block in zip(self.layers, self.decoder.layers, strict=True)
            ]
            self._state = state
        return self._prepared

    def freeze(self, dtype: torch.dtype) -> None:
        """Keep the prepared weights alone: those of the modules, of which they are a copy, are given up."""
        self.prepare(dtype, pack=True)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
        self._frozen = True

    def hidden_states(
        self,
        token_ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        plan: AttentionPlan,
        dtype: torch.dtype,
        recompute: bool = False,
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states, after the final norm, with `plan` doing the attention; see `LanguageModel.recompute`."""
        batch, length = token_ids.shape
        training = torch.is_grad_enabled()
        with torch.autocast(token_ids.device.type, enabled=False):
            prepared = self.prepare(dtype, pack=not training)
            hidden: Tensor = _Embedding.apply(token_ids.flatten(), self.decoder.embed_tokens.weight)  # type: ignore[no-untyped-call]
            cos, sin = self.decoder.rotary_emb(hidden, positions)
            rope = cos.reshape(batch * length, -1), sin.reshape(batch * length, -1)
            if training:
                for each in prepared:
                    if recompute:
                        hidden = checkpoint(_trained, each, hidden, rope, plan, batch, use_reentrant=False)
                    else:
                        hidden = _trained(each, hidden, rope, plan, batch)
            else:
                delta, decoding = None, plan if isinstance(plan, ProjectedAttention) else None
                for each in prepared:
                    hidden, delta = _computed(each, hidden, delta, rope, plan, batch, decoding)
                hidden, _ = add_norm(hidden, delta, None, 0.0, dtype)
            last: Tensor = self.decoder.norm(hidden)
            return last.view(batch, length, -1)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.token_ids, ctx.weight = token_ids, weight
        return weight[token_ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, ctx.token_ids, grad)
        return None, None


def _trained(each: _Prepared, hidden: Tensor, rope: Rope, plan: AttentionPlan, batch: int) -> Tensor:
    query, key, value = _QueryKeyValue.apply(hidden, each, rope, *each.parameters)  # type: ignore[no-untyped-call]
    attended = _attend(each.layer, query, key, value, plan, batch)
    made: Tensor = _Rest.apply(attended, hidden, each, *each.parameters)  # type: ignore[no-untyped-call]
    return made


def _computed(
    each: _Prepared,
    hidden: Tensor,
    delta: Tensor | None,
    rope: Rope,
    plan: AttentionPlan,
    batch: int,
    decoding: ProjectedAttention | None,
) -> tuple[Tensor, Tensor]:
    """The rows after a layer's attention, and what its last product adds to them; the rows before the layer are
    hidden + delta. `decoding`: the plan, where it takes rows as they are projected."""
    hidden, normed = _normed(hidden, delta, each.block.input_layernorm, each.dtype)
    projected = each.qkv(normed).view(len(hidden), -1, each.block.self_attn.head_dim)
    attended = None
    if decoding is not None:
        attended = decoding.attend_projected(each.layer, projected, each.queries, rope, each.norms)
    if attended is None:
        made = apply_rope(projected, each.queries, rope, each.norms, hidden.dtype)
        attended = _attend(each.layer, *made, plan, batch)
    middle, normed = _normed(hidden, each.out(attended), each.block.post_attention_layernorm, each.dtype)
    return middle, each.down(gate(each.gate_up(normed)))


def _normed(hidden: Tensor, delta: Tensor | None, norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made, normed = add_norm(hidden, delta, norm.weight.detach(), norm.variance_epsilon, dtype)
    assert normed is not None
    return made, normed


def _attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, batch: int) -> Tensor:
    """Rows to sequences, through the plan, and back."""
    query, key, value = (part.view(batch, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
    return plan.attend(layer, query, key, value).reshape(query.shape[0] * query.shape[2], -1)


class _QueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, each: _Prepared, rope: Rope, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = _normed(hidden, None, each.block.input_layernorm, each.dtype)[1]
        projected = each.qkv(normed).view(len(hidden), -1, each.block.self_attn.head_dim)
        ctx.save_for_backward(hidden, None if each.norms[0] is None else projected, *rope)
        ctx.each = each
        return apply_rope(projected, each.queries, rope, each.norms, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projected, cos, sin = ctx.saved_tensors
        each: _Prepared = ctx.each
        with torch.autocast(hidden.device.type, enabled=False):
            wide = hidden.dtype if projected is not None else each.dtype
            query, key, value = (grad.contiguous() for grad in grads)
            turned = apply_rope_backward(query, key, value, (cos, sin), wide)
            if projected is not None:
                turned = _head_norms_backward(each, turned, projected).to(each.dtype)
            normed = _normed(hidden, None, each.block.input_layernorm, each.dtype)[1]
            grad = each.qkv.backward(turned.flatten(1), normed)
            made = _norm_backward(grad, hidden, each.block.input_layernorm)
            return made, None, None, *(None for _ in each.parameters)


def _head_norms_backward(each: _Prepared, grad: Tensor, projected: Tensor) -> Tensor:
    """Of rows [queries, keys, values]: back through the norms that queries and keys have of their own."""
    attention, queries = each.block.self_attn, each.queries
    keys = (projected.shape[1] - queries) // 2
    parts = zip(grad.split([queries, keys, keys], dim=1), projected.split([queries, keys, keys], dim=1), strict=True)
    (of_query, query), (of_key, key), (of_value, _) = parts
    return torch.cat(
        [_norm_backward(of_query, query, attention.q_norm), _norm_backward(of_key, key, attention.k_norm), of_value], 1
    )


class _Rest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, hidden: Tensor, each: _Prepared, *_: Tensor) -> Tensor:
        attended = attended.to(each.dtype)
        middle, normed = _normed(hidden, each.out(attended), each.block.post_attention_layernorm, each.dtype)
        gated = each.gate_up(normed)
        ctx.save_for_backward(attended, middle, gated)
        ctx.each = each
        return add_norm(middle, each.down(gate(gated)), None, 0.0, each.dtype)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, middle, gated = ctx.saved_tensors
        each: _Prepared = ctx.each
        norm = each.block.post_attention_layernorm
        with torch.autocast(grad.device.type, enabled=False):
            inner = each.down.backward(grad.to(each.dtype), gate(gated))
            normed = _normed(middle, None, norm, each.dtype)[1]
            slopes = each.gate_up.backward(gate_backward(gated, inner), normed)
            own = _norm_backward(slopes, middle, norm, grad)
            return (
                each.out.backward(own.to(each.dtype), attended).to(middle.dtype),
                own,
                None,
                *(None for _ in each.parameters),
            )


def _norm_backward(grad: Tensor, rows: Tensor, norm: Any, more: Tensor | None = None) -> Tensor:
    """Adds the gradient of the weight; returns that of the rows, plus `more`."""
    made, of_weight = norm_backward(grad, rows, norm.weight.detach(), norm.variance_epsilon, more)
    accumulate(norm.weight, of_weight)
    return made
