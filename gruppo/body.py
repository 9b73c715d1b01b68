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
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

from gruppo.attention import AttentionPlan, Layer
from gruppo.maths.products import packed, product

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class Cast:
    """A weight in another dtype, cast again when it has changed."""

    def __init__(self) -> None:
        self._state: object = None
        self._made: Tensor | None = None

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight itself where it has that dtype."""
        state = weight.data_ptr(), weight._version, dtype
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


@dataclass(frozen=True, slots=True)
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
        self, decoder: nn.Module, layers: Sequence[Layer], weight_of: Callable[[Any], Tensor] | None = None
    ) -> None:
        """`layers`: what each layer's attention computes, in order. `weight_of`: the weight of a linear layer where
        that is not its own (an adapter is merged); such a body computes, but gives no gradients."""
        self.decoder: Any = decoder
        self.layers = list(layers)
        self.weight_of, self.trains = weight_of or (lambda module: module.weight), weight_of is None
        self._state: object = None
        self._prepared: list[_Prepared] = []

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
        state = dtype, pack, [(weight.data_ptr(), weight._version) for weight in self._weights]
        if state != self._state:
            self._prepared = []  # freed before the new ones are made
            self._prepared = [
                _Prepared(layer, block, *(Linear.of(part, self.weight_of, dtype, pack) for part in _linear(block)))
                for layer, block in zip(self.layers, self.decoder.layers, strict=True)
            ]
            self._state = state
        return self._prepared

    @cached_property
    def _weights(self) -> list[Tensor]:
        modules = [module for block in self.decoder.layers for part in _linear(block) for module in part]
        return [weight for module in modules for weight in module.parameters()]

    def freeze(self, dtype: torch.dtype) -> None:
        """Keep the prepared weights alone: those of the modules, of which they are a copy, are given up."""
        self.prepare(dtype, pack=True)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
        self._weights = []
        self._state = dtype, True, []

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
            rope = cos.reshape(batch * length, 1, -1), sin.reshape(batch * length, 1, -1)
            run = _trained if training else _computed
            for each in prepared:
                if training and recompute:
                    hidden = checkpoint(run, each, hidden, rope, plan, batch, use_reentrant=False)
                else:
                    hidden = run(each, hidden, rope, plan, batch)
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


def _trained(each: _Prepared, hidden: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, batch: int) -> Tensor:
    query, key, value = _QueryKeyValue.apply(hidden, each, rope, *each.parameters)  # type: ignore[no-untyped-call]
    attended = _attend(each.layer, query, key, value, plan, batch)
    made: Tensor = _Rest.apply(attended, hidden, each, *each.parameters)  # type: ignore[no-untyped-call]
    return made


def _computed(each: _Prepared, hidden: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, batch: int) -> Tensor:
    query, key, value = _query_key_value(each, hidden, rope)[0]
    attended = _attend(each.layer, query, key, value, plan, batch)
    return _rest(each, attended, hidden)[0]


def _attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, batch: int) -> Tensor:
    """Rows to sequences, through the plan, and back."""
    query, key, value = (part.view(batch, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
    return plan.attend(layer, query, key, value).reshape(query.shape[0] * query.shape[2], -1)


def _query_key_value(
    each: _Prepared, hidden: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries, keys and values [N, heads, D]; beside them what was projected."""
    attention = each.block.self_attn
    normed = _norm(hidden, each.block.input_layernorm).to(each.qkv.weight.dtype)
    projected = each.qkv(normed).view(len(hidden), -1, attention.head_dim)
    queries, keys = _heads(attention)
    both, value = projected[:, : queries + keys].to(hidden.dtype), projected[:, queries + keys :].to(hidden.dtype)
    if hasattr(attention, "q_norm"):
        both = torch.cat([_norm(both[:, :queries], attention.q_norm), _norm(both[:, queries:], attention.k_norm)], 1)
    rotated = _rotate(both, rope)
    return (rotated[:, :queries], rotated[:, queries:], value), projected


def _heads(attention: Any) -> tuple[int, int]:
    """Heads of queries and of keys."""
    return attention.q_proj.out_features // attention.head_dim, attention.k_proj.out_features // attention.head_dim


def _rotate(rows: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions of float32 rows, each of two halves (a, b): (a · cos - b · sin, b · cos + a · sin)."""
    cos, sin = rope
    half = rows.shape[-1] // 2
    turned = rows * cos
    turned[..., :half].addcmul_(rows[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(rows[..., :half], sin[..., half:])
    return turned


def _rotate_backward(grad: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    half = grad.shape[-1] // 2
    made = grad * cos
    made[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    made[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return made


class _QueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, each: _Prepared, rope: tuple[Tensor, Tensor], *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        made, projected = _query_key_value(each, hidden, rope)
        kept = projected if hasattr(each.block.self_attn, "q_norm") else None
        ctx.save_for_backward(hidden, kept, *rope)
        ctx.each = each
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projected, *rope = ctx.saved_tensors
        each: _Prepared = ctx.each
        attention, norm = each.block.self_attn, each.block.input_layernorm
        with torch.autocast(hidden.device.type, enabled=False):
            both = _rotate_backward(torch.cat(grads[:2], dim=1), tuple(rope))
            if projected is not None:
                queries, keys = _heads(attention)
                parts = projected[:, : queries + keys].split([queries, keys], dim=1)
                norms = attention.q_norm, attention.k_norm
                split = zip(both.split([queries, keys], dim=1), parts, norms, strict=True)
                both = torch.cat([_norm_backward(grad, part, own) for grad, part, own in split], dim=1)
            dtype = each.qkv.weight.dtype
            grad = torch.cat([both.to(dtype), grads[2].to(dtype)], dim=1).flatten(1)
            grad = each.qkv.backward(grad, _norm(hidden, norm).to(dtype))
            return _norm_backward(grad, hidden, norm), None, None, *(None for _ in each.parameters)


def _rest(each: _Prepared, attended: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output; beside it the rows after attention, and what gate and up make of them."""
    middle = hidden + each.out(attended)
    gated = each.gate_up(_norm(middle, each.block.post_attention_layernorm))
    gate, up = gated.chunk(2, dim=-1)
    return middle + each.down(silu(gate).mul_(up)), middle, gated


class _Rest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, hidden: Tensor, each: _Prepared, *_: Tensor) -> Tensor:
        attended = attended.to(each.out.weight.dtype)
        made, middle, gated = _rest(each, attended, hidden)
        ctx.save_for_backward(attended, middle, gated)
        ctx.each = each
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, middle, gated = ctx.saved_tensors
        each: _Prepared = ctx.each
        dtype, norm = each.down.weight.dtype, each.block.post_attention_layernorm
        with torch.autocast(grad.device.type, enabled=False):
            gate, up = gated.chunk(2, dim=-1)
            opened = silu(gate)
            inner = each.down.backward(grad.to(dtype), opened * up)
            slopes = torch.empty_like(gated)
            torch.mul(inner, opened, out=slopes[:, gate.shape[-1] :])
            torch.ops.aten.silu_backward.grad_input(inner * up, gate, grad_input=slopes[:, : gate.shape[-1]])
            normed = _norm(middle, norm).to(dtype)
            own = _norm_backward(each.gate_up.backward(slopes, normed), middle, norm).add_(grad)
            return (
                each.out.backward(own.to(dtype), attended).to(middle.dtype),
                own,
                None,
                *(None for _ in each.parameters),
            )


def _norm(rows: Tensor, norm: Any) -> Tensor:
    """RMS norm: weight · x / √(mean x² + ε)."""
    wide = rows.to(torch.promote_types(rows.dtype, norm.weight.dtype))
    scaled: Tensor = wide * norm.weight
    return scaled.mul_(_inverse_size(wide, norm))


def _inverse_size(rows: Tensor, norm: Any) -> Tensor:
    """1 / √(mean x² + ε) of each row."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return sizes.square_().div_(rows.shape[-1]).add_(norm.variance_epsilon).rsqrt_()


def _norm_backward(grad: Tensor, rows: Tensor, norm: Any) -> Tensor:
    """Adds the gradient of the weight; returns that of the rows."""
    weight = norm.weight.detach()
    wide, grad = rows.to(weight.dtype), grad.to(weight.dtype)
    scale = _inverse_size(wide, norm)
    normed = wide * scale
    joint = grad * normed
    accumulate(norm.weight, joint.flatten(0, -2).sum(dim=0))
    share = (joint @ weight).div_(weight.numel()).unsqueeze(-1)
    return torch.mul(grad, weight, out=joint).addcmul_(normed, share, value=-1).mul_(scale)
