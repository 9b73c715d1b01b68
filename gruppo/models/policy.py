"""The policy: a causal language model with tokenizer, devices and dtypes, and its copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
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

from gruppo.models.attention.backends import BACKENDS, Backend
from gruppo.models.attention.interface import AttentionPlan, attention_plan, exclude_attention_from_compilation
from gruppo.models.fused_decoder import Cast, FusedBody
from gruppo.models.generation import Generation
from gruppo.models.logprobs import OutputHead, logit_block, token_logprobs
from gruppo.models.precision import prepare_for_float64
from gruppo.models.weights import WeightSource, named_weights
from gruppo.utils.determinism import deterministic
from gruppo.utils.token_text import ids_without_text


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and the settings to compute with it.

    `model` has float32 weights (float64 for `float64_copy`); matmuls run in `dtype`, the compute dtype. `eos_ids`: all
    token ids that end a turn. `context`: the maximum number of tokens of a sequence. `head_scale`, `head_softcap`: see
    `OutputHead`. `cache_bytes`: size of the keys and values of one token in all layers. `body`: the decoder with fused
    matmuls, if available; otherwise the module computes. `recompute`: keep only the input of every layer for backward,
    and compute the layer again there. `attention`: computes the attention of packed groups. `compiled`: whether layers
    run through torch's compiler. `generation`: counter of weight changes. `sharded`: this process holds a shard of each
    weight, and the whole of it only while a module that needs it runs. `root`: the module to score tokens with then.
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
    attention: Backend = BACKENDS["cpu"]
    compiled: bool = False
    generation: Generation = field(default_factory=Generation)
    sharded: bool = False
    root: TokenScorer | None = None

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Run matmuls in `dtype` inside the block, with deterministic kernels on cuda (see `deterministic`).

        Each weight is cast at most once per block, or at each use if weights are sharded: a kept cast would be whole.
        """
        narrow: AbstractContextManager[object] = nullcontext()
        if self.dtype == torch.bfloat16:
            narrow = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.sharded)
        with deterministic(self.device), narrow:
            yield

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the keys and values that the native engine keeps: on a CPU the accumulation dtype, which its
        kernels read, else the compute dtype."""
        return torch.promote_types(self.dtype, torch.float32) if self.device.type == "cpu" else self.dtype

    @cached_property
    def configs(self) -> list[PreTrainedConfig]:
        """The configs that select the attention implementation of the modules, without duplicates."""
        configs = {id(module.config): module.config for module in self.model.modules() if hasattr(module, "config")}
        return [config for config in configs.values() if isinstance(config, PreTrainedConfig)]

    def hidden_states(
        self, token_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], plan: AttentionPlan
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states, after the final norm. `plan` computes the attention."""
        if self.body is not None and (self.body.trains or not torch.is_grad_enabled()):
            return self.body.hidden_states(token_ids, positions, plan, self.dtype, self.recompute)
        recompute = self.recompute and torch.is_grad_enabled()
        with attention_plan(self.configs, plan), self._recomputing(plan) if recompute else nullcontext():
            output = self.model.get_decoder()(input_ids=token_ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @cached_property
    def layers(self) -> list[Any]:
        """The decoder's layers."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _recomputing(self, plan: AttentionPlan) -> AbstractContextManager[None]:
        """Let the decoder layers keep only their inputs inside the block. `plan` is active again during backward."""

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            return nullcontext(), attention_plan(self.configs, plan)

        forwards = [
            partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts) for layer in self.layers
        ]
        return replaced_forwards(self.layers, forwards)

    def compiling(self) -> AbstractContextManager[None]:
        """Run the decoder layers through torch's compiler inside the block, if the policy is `compiled`."""
        return replaced_forwards(self.layers, self._compiled_forwards) if self.compiled else nullcontext()

    @cached_property
    def _compiled_forwards(self) -> list[Callable[..., Any]]:
        """The forward methods of the layers, compiled once for all layers of a class and all numbers of tokens.

        Attention is left out: it has kernels of its own, and its plans differ from one micro-batch to the next.
        """
        exclude_attention_from_compilation()
        return [torch.compile(layer.forward, dynamic=True) for layer in self.layers]

    @property
    def head_size(self) -> int:
        """Number of token ids that can be sampled."""
        layer: Any = self.model.get_output_embeddings()
        return len(layer.weight)

    @cached_property
    def ids_without_text(self) -> frozenset[int]:
        """Token ids that can be sampled, and for which the tokenizer has no text."""
        return ids_without_text(self.tokenizer, range(self.head_size))

    @property
    def scorer(self) -> TokenScorer:
        """The policy as a module that scores tokens. Not cached: a reference cycle would keep the policy alive."""
        return TokenScorer(self) if self.root is None else self.root

    def score_tokens(
        self,
        token_ids: Int[Tensor, " T"],
        positions: Int[Tensor, " T"],
        layout: Sequence[tuple[int, Sequence[int]]],
        predictors: Int[Tensor, " N"],
        targets: Int[Tensor, " N"],
        temperature: float,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """See `TokenScorer.forward`."""
        scores: tuple[Tensor, Tensor] = self.scorer(token_ids, positions, layout, predictors, targets, temperature)
        return scores

    @property
    def head(self) -> OutputHead:
        """The output head with its weight in the compute dtype, cast again when it has changed."""
        layer: Any = self.model.get_output_embeddings()
        cast = layer.weight.detach().to(self.dtype) if self.sharded else self._head_weight(layer.weight, self.dtype)
        return OutputHead(cast, layer.bias, self.head_scale, self.head_softcap, layer.weight)

    @cached_property
    def _head_weight(self) -> Cast:
        return Cast(self.generation)

    def frozen_copy(self) -> LanguageModel:
        """A copy that updates do not change: the reference policy.

        Weights used only in matmuls are stored in `dtype`, to which they would be cast at each use anyway. So the copy
        computes the same numbers as the original.
        """
        model = copy.deepcopy(self.model).requires_grad_(False)
        generation = Generation()
        body = self.body and FusedBody(model.get_decoder(), self.body.layers, generation)
        if body is not None:
            body.freeze(self.dtype)
        narrow_products(model, self.dtype)
        return replace(self, model=model, body=body, generation=generation)

    def sampling_copy(self) -> LanguageModel:
        """A copy for an engine that receives weights, with the weights of matmuls in the compute dtype."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return self._for_sampling(model)

    def _for_sampling(self, model: PreTrainedModel) -> LanguageModel:
        generation = Generation()
        body = self.body and FusedBody(model.get_decoder(), self.body.layers, generation)
        narrow_products(model, self.dtype)
        shared = {item.name: getattr(self, item.name) for item in fields(LanguageModel)}
        return LanguageModel(**shared | {"model": model, "body": body, "generation": generation})

    def float64_copy(self) -> LanguageModel:
        """A float64 copy without gradients, computed by transformers' own modules, for numerical checks."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        nn.Module.to(model, torch.float64)
        prepare_for_float64(model)
        return replace(
            self,
            model=model,
            body=None,
            dtype=torch.float64,
            attention=BACKENDS["sdpa"],
            compiled=False,
            generation=Generation(),
        )

    def weights(self) -> dict[str, Tensor]:
        """The weights of the saved model, by name."""
        return named_weights(self.model)

    def weight_source(self) -> WeightSource:
        """The weights for an engine, one tensor at a time."""
        return WeightSource(self.model, lambda: iter(self.weights().items()), self)

    @torch.no_grad()
    def take_weights(self, source: WeightSource) -> None:
        """Copy weights by name into this model. Raises ValueError if their names are not those of its weights."""
        targets = self.weights()
        self.generation.advance()
        for name, tensor in source:
            if name not in targets:
                raise ValueError(f"weights of {name!r}: the engine's model has no weight of that name")
            targets.pop(name).copy_(tensor)
        if targets:
            raise ValueError(f"weights of {min(targets)!r}: missing")


class TokenScorer(nn.Module):
    """A policy as a module that scores tokens of packed groups.

    All weights, including the weight of the output head, are read inside `forward`. So this is the module to shard:
    code that gathers the weights of a module for its forward pass gathers all of them here.
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
        """Log-probabilities of the targets, and the entropy at each, in nats at `temperature`. See `Batch`."""
        hidden = predicting_states(self.policy, token_ids, positions, layout, predictors)
        head, accelerator = self.policy.head, self.policy.device.type != "cpu"
        block = logit_block(len(head.weight), head.accumulation_dtype.itemsize, accelerator)
        return token_logprobs(hidden, head, targets, temperature, *block)


def predicting_states(
    policy: LanguageModel,
    token_ids: Int[Tensor, " T"],
    positions: Int[Tensor, " T"],
    layout: Sequence[tuple[int, Sequence[int]]],
    predictors: Int[Tensor, " N"],
) -> Float[Tensor, "N H"]:
    """The hidden state that predicts each completion token of packed groups. Call inside `policy.precision()`."""
    plan = policy.attention(layout, policy.device)
    with policy.compiling():
        hidden = policy.hidden_states(token_ids[None], positions[None], plan)[0]
    return hidden.index_select(0, predictors)


@contextmanager
def replaced_forwards(modules: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let the modules run these functions in place of their forward methods inside the block."""
    before = [vars(module).get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def narrow_products(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in `dtype`, to which they are cast at each use.

    Unchanged are an output head whose weight is also the embedding, and the bias of the head, which is added to logits
    in the accumulation dtype.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in shared:
            for tensor in module.parameters(recurse=False):
                if tensor.is_floating_point() and (module is not head or tensor is module.weight):
                    tensor.data = tensor.data.to(dtype)
