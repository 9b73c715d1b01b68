"""A causal language model with what is needed to compute with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from gruppo.models.attention.interface import AttentionPlan, attention_plan
from gruppo.models.attention.shared_prefix import SharedPrefixAttention
from gruppo.models.fused_decoder import Cast, FusedBody
from gruppo.models.generation import Generation
from gruppo.models.logprobs import OutputHead, token_logprobs
from gruppo.models.precision import prepare_for_float64
from gruppo.models.weights import WeightSource, named_weights


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with what is needed to compute with it.

    `model` holds float32 weights (float64 in proofs); matrix products run in `dtype`.
    `eos_ids`: every token id that ends a turn. `context`: the most tokens that a sequence may have.
    `head_scale`, `head_softcap`: see `OutputHead`. `cache_bytes`: of the keys and values of one token, in all layers.
    `body`: the decoder with fused products, where there is one; otherwise the module computes. `recompute`: of every
    layer only the input is kept for backward, which computes the layer again. `generation`: changes with the weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    context: int
    device: torch.device
    dtype: torch.dtype
    head_scale: float = 1.0
    head_softcap: float | None = None
    cache_bytes: int = 0
    body: FusedBody | None = None
    recompute: bool = False
    generation: Generation = field(default_factory=Generation)

    def precision(self) -> AbstractContextManager[object]:
        """Products in `dtype` inside the block; each weight is cast at most once in it."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @cached_property
    def configs(self) -> list[PreTrainedConfig]:
        """The configs by which the model's modules choose their attention, each once."""
        own = {id(module.config): module.config for module in self.model.modules() if hasattr(module, "config")}
        return [config for config in own.values() if isinstance(config, PreTrainedConfig)]

    def hidden_states(
        self, token_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], plan: AttentionPlan
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states, after the final norm, with `plan` doing the attention."""
        if self.body is not None and (self.body.trains or not torch.is_grad_enabled()):
            return self.body.hidden_states(token_ids, positions, plan, self.dtype, self.recompute)
        recompute = self.recompute and torch.is_grad_enabled()
        with attention_plan(self.configs, plan), self._recomputing(plan) if recompute else nullcontext():
            output = self.model.get_decoder()(input_ids=token_ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @contextmanager
    def _recomputing(self, plan: AttentionPlan) -> Iterator[None]:
        """Inside the block the decoder's layers keep their inputs alone; `plan` is there again when backward comes."""

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            return nullcontext(), attention_plan(self.configs, plan)

        layers: list[Any] = [each for each in self.model.modules() if isinstance(each, GradientCheckpointingLayer)]
        before = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    @property
    def scorer(self) -> TokenScorer:
        """The policy as a module that scores tokens. Not kept: a circle of references would keep a policy alive."""
        return TokenScorer(self)

    @property
    def head(self) -> OutputHead:
        """The output head, its weight in the dtype of products: cast again when it has changed."""
        layer: Any = self.model.get_output_embeddings()
        return OutputHead(
            self._head_weight(layer.weight, self.dtype), layer.bias, self.head_scale, self.head_softcap, layer.weight
        )

    @cached_property
    def _head_weight(self) -> Cast:
        return Cast(self.generation)

    def frozen_copy(self) -> LanguageModel:
        """A copy that no update changes: the reference. Weights that are only used in products are kept in `dtype`,
        which is what they are cast to at each use, so that its numbers are those of the original."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        generation = Generation()
        body = self.body and FusedBody(model.get_decoder(), self.body.layers, generation)
        if body is not None:
            body.freeze(self.dtype)
        narrow_products(model, self.dtype)
        return replace(self, model=model, body=body, generation=generation)

    def float64_copy(self) -> LanguageModel:
        """A copy in float64 without gradients, for proofs, which transformers' own modules compute."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        nn.Module.to(model, torch.float64)
        prepare_for_float64(model)
        return replace(self, model=model, body=None, dtype=torch.float64, generation=Generation())

    def weights(self) -> dict[str, Tensor]:
        """What the saved model holds, by name."""
        return named_weights(self.model)

    def weight_source(self) -> WeightSource:
        """The weights for an engine, one tensor at a time."""
        return WeightSource(self.model, lambda: iter(self.weights().items()))


class TokenScorer(nn.Module):
    """A policy as a module that scores tokens of packed groups.

    Every weight, that of the output head too, is read inside `forward`. So this is the module to shard: whoever gathers
    the weights of a module for its forward pass has all of them there.
    """

    def __init__(self, policy: LanguageModel) -> None:
        super().__init__()
        self.model, self.policy = policy.model, policy

    def forward(
        self,
        token_ids: Int[Tensor, " T"],
        positions: Int[Tensor, " T"],
        layout: Sequence[tuple[int, Sequence[int]]],
        predictors: Int[Tensor, " N"],
        targets: Int[Tensor, " N"],
        temperature: float,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Log-probabilities of the targets and the entropy at each, in nats, at the temperature; see `Batch`."""
        hidden = predicting_states(self.policy, token_ids, positions, layout, predictors)
        return token_logprobs(hidden, self.policy.head, targets, temperature)


def predicting_states(
    policy: LanguageModel,
    token_ids: Int[Tensor, " T"],
    positions: Int[Tensor, " T"],
    layout: Sequence[tuple[int, Sequence[int]]],
    predictors: Int[Tensor, " N"],
) -> Float[Tensor, "N H"]:
    """The hidden state that predicts each completion token of packed groups. Call it inside `policy.precision()`."""
    hidden = policy.hidden_states(token_ids[None], positions[None], SharedPrefixAttention(layout))[0]
    return hidden.index_select(0, predictors)


def narrow_products(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers in `dtype`, which is what they are cast to at each use. Left as they are: an
    output head that is the embedding too, and the bias of a head, which is added to wide logits."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in shared:
            for tensor in module.parameters(recurse=False):
                if module is not head or tensor is module.weight:
                    tensor.data = tensor.data.to(dtype)
