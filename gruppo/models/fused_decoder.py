"""The Llama family's decoder for a CPU: fused matmuls, hand-written gradients, few tensors kept for backward.

On a CPU, it replaces transformers' modules if a trial shows that it reproduces their numbers
(`gruppo.models.compatibility`). All other models, and all devices that are not a CPU, run through the modules
themselves. Matmuls run in the compute dtype of the policy, on weights that are
prepared once and again when they change. Everything between them is in the accumulation dtype, float32 (or float64), as
under autocast.

The gradient of a weight is added to its `.grad` as soon as it is computed, so it does not stay in memory for the rest
of the backward pass. Therefore `backward()` gives all gradients, and `torch.autograd.grad` with respect to weights
gives none.
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
from gruppo.models.attention.shared_prefix import SharedPrefixAttention
from gruppo.models.generation import Generation
from gruppo.models.ops.attention import PackedLayout, attend_packed, attend_packed_backward
from gruppo.models.ops.linear import packed, product
from gruppo.models.ops.norm import add_norm, norm_backward
from gruppo.models.ops.rope import QKNorm, Rope, apply_rope, apply_rope_backward
from gruppo.models.ops.swiglu import gate, gate_backward

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class Cast:
    """A cached cast of a weight to another dtype, renewed when weights have changed."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._state: object = None
        self._cast: Tensor | None = None

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`; the weight itself if it has this dtype already."""
        state = self.generation.number, dtype
        if self._cast is None or state != self._state:
            self._cast = None  # freed before the new cast is allocated
            self._state, self._cast = state, weight.detach().to(dtype)
        return self._cast


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers with the same input, as one matmul: their weights are stacked, in the compute dtype."""

    modules: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, modules: Sequence[Any], weight_of: Callable[[Any], Tensor], dtype: torch.dtype, pack: bool) -> Linear:
        """Prepare the current weights of the modules. `pack`: in the layout of `gruppo.models.ops.linear.packed`."""
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
                biases = [
                    weight.new_zeros(size) if m.bias is None else m.bias for m, size in zip(modules, rows, strict=True)
                ]
                bias = torch.cat(biases).to(dtype)
            return cls(tuple(modules), packed(weight) if pack else weight, bias)

    def __call__(self, rows: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """rows · weightᵀ + bias."""
        return product(rows, self.weight, self.bias)

    def backward(self, grad: Float[Tensor, "N O"], rows: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Add the gradients of weights and biases, and return the gradient of the rows."""
        start = 0
        gradient = grad.T @ rows
        sums = None if self.bias is None else grad.sum(dim=0)
        for module in self.modules:
            end = start + module.weight.shape[0]
            accumulate(module.weight, gradient[start:end])
            if sums is not None and module.bias is not None:
                accumulate(module.bias, sums[start:end])
            start = end
        return grad @ self.weight


@dataclass(frozen=True)
class _Prepared:
    """A layer with its weights prepared for matmuls."""

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
        """The compute dtype."""
        return self.qkv.weight.dtype

    @cached_property
    def queries(self) -> int:
        """The number of query heads."""
        return int(self.block.self_attn.q_proj.out_features // self.block.self_attn.head_dim)

    @cached_property
    def keys(self) -> int:
        """The number of key heads."""
        return int(self.block.self_attn.k_proj.out_features // self.block.self_attn.head_dim)

    @cached_property
    def norms(self) -> QKNorm:
        """The norms of query and key heads: weights and ε, or None without such norms."""
        attention = self.block.self_attn
        if not hasattr(attention, "q_norm"):
            return None, None, 0.0
        query, key = attention.q_norm, attention.k_norm
        return query.weight.detach(), key.weight.detach(), query.variance_epsilon


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add `gradient` to the gradient of the parameter, in the dtype of the parameter."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        parameter.grad.add_(gradient)


def _linear(block: Any) -> tuple[list[Any], ...]:
    """The linear layers of a block in the order of `_Prepared`. Layers with the same input are in one list."""
    attention, mlp = block.self_attn, block.mlp
    return (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )


class FusedBody:
    """A decoder of the Llama family. Computes the same as its module, from token ids to last hidden states."""

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[Layer],
        generation: Generation,
        weight_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """`layers`: the attention parameters of each layer, in order. `generation`: that of the decoder's weights.

        `weight_of`: returns the weight of a linear layer if it is not the layer's own weight (an adapter is merged).
        With it, the body computes no gradients.
        """
        self.decoder: Any = decoder
        self.layers, self.generation = list(layers), generation
        self.weight_of, self.trains = weight_of or (lambda module: module.weight), weight_of is None
        self._state: object = None
        self._prepared: list[_Prepared] = []
        self._frozen = False

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether the decoder consists of the parts implemented here. A trial must verify the rest."""
        blocks = getattr(decoder, "layers", [])
        if not blocks or any(type(block).__name__ not in _LAYERS for block in blocks):
            return False
        linear = [module for block in blocks for name, module in block.named_modules() if name.endswith("_proj")]
        rotary = decoder.rotary_emb.inv_freq.numel() * 2 == blocks[0].self_attn.head_dim
        activations = {type(block.mlp.act_fn) for block in blocks}
        return (
            rotary and activations <= {nn.SiLU, SiLUActivation} and all(type(module) is nn.Linear for module in linear)
        )

    def prepare(self, dtype: torch.dtype, pack: bool) -> list[_Prepared]:
        """The layers with their weights in `dtype`, the compute dtype; prepared again when a weight has changed."""
        state = dtype, pack, self.generation.number
        if state != self._state and not self._frozen:
            self._prepared = []  # freed before the new ones are allocated
            self._prepared = [
                _Prepared(layer, block, *(Linear.of(part, self.weight_of, dtype, pack) for part in _linear(block)))
                for layer, block in zip(self.layers, self.decoder.layers, strict=True)
            ]
            self._state = state
        return self._prepared

    def freeze(self, dtype: torch.dtype) -> None:
        """Keep only the prepared weights. The weights of the linear modules, of which they are copies, are freed."""
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
        """Last hidden states, after the final norm. `plan` computes the attention.

        `recompute`: see `LanguageModel`. Raises RuntimeError for weights that are not on a CPU.
        """
        if (kind := self.decoder.embed_tokens.weight.device.type) != "cpu":
            raise RuntimeError(f"the fused decoder is for a CPU, and its weights are on {kind}; run the modules there")
        batch, length = token_ids.shape
        training = torch.is_grad_enabled()
        with torch.autocast(token_ids.device.type, enabled=False):
            prepared_layers = self.prepare(dtype, pack=not training)
            hidden: Tensor = _Embedding.apply(token_ids.flatten(), self.decoder.embed_tokens.weight)  # type: ignore[no-untyped-call]
            cos, sin = self.decoder.rotary_emb(hidden, positions)
            rope = cos.reshape(batch * length, -1), sin.reshape(batch * length, -1)
            if training:
                for prepared in prepared_layers:
                    if recompute:
                        hidden = checkpoint(_trained, prepared, hidden, rope, plan, batch, use_reentrant=False)
                    else:
                        hidden = _trained(prepared, hidden, rope, plan, batch)
            else:
                delta, decoding = None, plan if isinstance(plan, ProjectedAttention) else None
                for prepared in prepared_layers:
                    hidden, delta = _computed(prepared, hidden, delta, rope, plan, batch, decoding)
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


def _trained(prepared: _Prepared, hidden: Tensor, rope: Rope, plan: AttentionPlan, batch: int) -> Tensor:
    attention, packing = prepared.block.self_attn, None
    if isinstance(plan, SharedPrefixAttention):
        packing = plan.packing(prepared.layer, hidden.new_empty(0, prepared.keys, attention.head_dim))
    if packing is None:
        query, key, value = _QueryKeyValue.apply(hidden, prepared, rope, *prepared.parameters)  # type: ignore[no-untyped-call]
        attended = _attend(prepared.layer, query, key, value, plan, batch)
    else:
        attended = _Attended.apply(hidden, prepared, rope, packing, *prepared.parameters)  # type: ignore[no-untyped-call]
    output: Tensor = _Rest.apply(attended, hidden, prepared, *prepared.parameters)  # type: ignore[no-untyped-call]
    return output


def _computed(
    prepared: _Prepared,
    hidden: Tensor,
    delta: Tensor | None,
    rope: Rope,
    plan: AttentionPlan,
    batch: int,
    decoding: ProjectedAttention | None,
) -> tuple[Tensor, Tensor]:
    """The rows after the attention of a layer, and the output of its last matmul, which is still to be added to them.

    The input of the layer is hidden + delta. `decoding`: the plan, if it takes projected rows.
    """
    hidden, normed = _normed(hidden, delta, prepared.block.input_layernorm, prepared.dtype)
    projected = prepared.qkv(normed).view(len(hidden), -1, prepared.block.self_attn.head_dim)
    attended = None
    if decoding is not None:
        attended = decoding.attend_projected(prepared.layer, projected, prepared.queries, rope, prepared.norms)
    if attended is None:
        heads = apply_rope(projected, prepared.queries, rope, prepared.norms, hidden.dtype)
        attended = _attend(prepared.layer, *heads, plan, batch)
    middle, normed = _normed(hidden, prepared.out(attended), prepared.block.post_attention_layernorm, prepared.dtype)
    return middle, prepared.down(gate(prepared.gate_up(normed)))


def _normed(hidden: Tensor, delta: Tensor | None, norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total, normed = add_norm(hidden, delta, norm.weight.detach(), norm.variance_epsilon, dtype)
    assert normed is not None
    return total, normed


def _attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, batch: int) -> Tensor:
    """Reshape rows to sequences, compute their attention with the plan, and reshape the result to rows."""
    query, key, value = (part.view(batch, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
    return plan.attend(layer, query, key, value).reshape(query.shape[0] * query.shape[2], -1)


class _QueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, prepared: _Prepared, rope: Rope, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = _projected(prepared, hidden)
        ctx.save_for_backward(hidden, None if prepared.norms[0] is None else projected, *rope)
        ctx.prepared = prepared
        return apply_rope(projected, prepared.queries, rope, prepared.norms, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projected, *rope = ctx.saved_tensors
        prepared: _Prepared = ctx.prepared
        grad_hidden = _projected_backward(prepared, hidden, projected, grads, (rope[0], rope[1]))
        return grad_hidden, None, None, *(None for _ in prepared.parameters)


class _Attended(torch.autograd.Function):
    """`_QueryKeyValue`, then the attention of packed rows.

    For backward it keeps the projected rows and makes the heads of them again. In bfloat16 they take half of the memory
    of the heads, and those of heads with norms are needed anyway.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, prepared: _Prepared, rope: Rope, packing: PackedLayout, *_: Tensor) -> Tensor:
        projected, layer = _projected(prepared, hidden), prepared.layer
        heads = _heads(prepared, projected, rope, hidden.dtype)
        attended, normalizer = attend_packed(*heads, packing, layer.scale, layer.window)
        ctx.save_for_backward(hidden, projected, attended, normalizer, *rope)
        ctx.rest = prepared, packing
        return attended.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projected, attended, normalizer, cos, sin = ctx.saved_tensors
        prepared, packing = ctx.rest
        heads, layer = _heads(prepared, projected, (cos, sin), hidden.dtype), prepared.layer
        grad, result = grad.contiguous().view_as(attended), (attended, normalizer)
        grads = attend_packed_backward(grad, heads, result, packing, layer.scale, layer.window)
        grad_hidden = _projected_backward(prepared, hidden, projected, grads, (cos, sin))
        return grad_hidden, None, None, None, *(None for _ in prepared.parameters)


def _projected(prepared: _Prepared, hidden: Tensor) -> Tensor:
    """Rows [queries, keys, values] of a layer's input, before norms of heads and rotary embeddings."""
    normed = _normed(hidden, None, prepared.block.input_layernorm, prepared.dtype)[1]
    return prepared.qkv(normed).view(len(hidden), -1, prepared.block.self_attn.head_dim)


def _projected_backward(
    prepared: _Prepared, hidden: Tensor, projected: Tensor | None, grads: Sequence[Tensor], rope: Rope
) -> Tensor:
    """The gradient of a layer's input. `grads`: of the heads that `apply_rope` makes of the projected rows.

    `projected` is needed if heads have norms.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        has_norms = prepared.norms[0] is not None
        query, key, value = (grad.contiguous() for grad in grads)
        rows = apply_rope_backward(query, key, value, rope, hidden.dtype if has_norms else prepared.dtype)
        if has_norms:
            assert projected is not None
            rows = _head_norms_backward(prepared, rows, projected).to(prepared.dtype)
        normed = _normed(hidden, None, prepared.block.input_layernorm, prepared.dtype)[1]
        grad = prepared.qkv.backward(rows.flatten(1), normed)
        return _norm_backward(grad, hidden, prepared.block.input_layernorm)


def _heads(prepared: _Prepared, projected: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = apply_rope(projected, prepared.queries, rope, prepared.norms, dtype)
    return query.contiguous(), key.contiguous(), value.contiguous()


def _head_norms_backward(prepared: _Prepared, grad: Tensor, projected: Tensor) -> Tensor:
    """Backward of the norms of query and key heads. `grad` is the gradient of rows [queries, keys, values]."""
    attention, queries = prepared.block.self_attn, prepared.queries
    keys = (projected.shape[1] - queries) // 2
    parts = zip(grad.split([queries, keys, keys], dim=1), projected.split([queries, keys, keys], dim=1), strict=True)
    (of_query, query), (of_key, key), (of_value, _) = parts
    return torch.cat(
        [_norm_backward(of_query, query, attention.q_norm), _norm_backward(of_key, key, attention.k_norm), of_value], 1
    )


class _Rest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, hidden: Tensor, prepared: _Prepared, *_: Tensor) -> Tensor:
        output = prepared.out(attended.to(prepared.dtype))
        middle, normed = _normed(hidden, output, prepared.block.post_attention_layernorm, prepared.dtype)
        gated = prepared.gate_up(normed)
        ctx.save_for_backward(attended, middle, gated)  # the attention keeps `attended` too
        ctx.prepared = prepared
        return add_norm(middle, prepared.down(gate(gated)), None, 0.0, prepared.dtype)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, middle, gated = ctx.saved_tensors
        prepared: _Prepared = ctx.prepared
        norm = prepared.block.post_attention_layernorm
        with torch.autocast(grad.device.type, enabled=False):
            inner = prepared.down.backward(grad.to(prepared.dtype), gate(gated))
            normed = _normed(middle, None, norm, prepared.dtype)[1]
            slopes = prepared.gate_up.backward(gate_backward(gated, inner), normed)
            grad_middle = _norm_backward(slopes, middle, norm, grad)
            return (
                prepared.out.backward(grad_middle.to(prepared.dtype), attended.to(prepared.dtype)).to(attended.dtype),
                grad_middle,
                None,
                *(None for _ in prepared.parameters),
            )


def _norm_backward(grad: Tensor, rows: Tensor, norm: Any, more: Tensor | None = None) -> Tensor:
    """Add the gradient of the weight, and return the gradient of the rows, plus `more`."""
    of_rows, of_weight = norm_backward(grad, rows, norm.weight.detach(), norm.variance_epsilon, more)
    accumulate(norm.weight, of_weight)
    return of_rows
