"""Low-rank adapters (LoRA) on a policy, in place, by peft, which is imported where an adapter is made and nowhere else.

W becomes W + alpha/rank · B·A, with A and B float32 and alone trained. B begins at 0, so the start policy is the model.
The reference is the same model with its adapters off: no second copy of the weights is held. Frozen weights of linear
layers are kept in the dtype of products, which is what the policy computes with; merging adds to them as they are kept.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gruppo.config.sections import Lora
from gruppo.errors import UsageError
from gruppo.models.attention.interface import AttentionPlan
from gruppo.models.fused_decoder import FusedBody
from gruppo.models.loading import ModelSource
from gruppo.models.policy import LanguageModel, narrow_products
from gruppo.models.weights import WeightSource, named_weights, trained_weights

if TYPE_CHECKING:
    from peft import LoraConfig

_NAME = "default"  # peft's own name for the adapter of a model that has one


# Where experts are one tensor, peft takes these for the names that the experts had when they were linear layers, also
# where it is a dense layer beside the experts that is called so.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class AdaptedModel(LanguageModel):
    """A language model whose linear layers carry adapters: applied, but merged for sampling by the fused body
    in float32."""

    def frozen_copy(self) -> LanguageModel:
        """The same modules with their adapters off: nothing is copied, and no update changes what it computes."""
        return _WithoutAdapters(**{field.name: getattr(self, field.name) for field in fields(self)} | {"body": None})

    def weights(self) -> dict[str, Tensor]:
        """What the saved model holds: the merged weights, under the names of a model without adapters."""
        return merged_weights(self.model)

    def weight_source(self) -> WeightSource:
        """The merged weights, one tensor at a time."""
        return WeightSource(self.model, lambda: _merged_one_by_one(self.model))


@dataclass(frozen=True)
class _WithoutAdapters(AdaptedModel):
    def hidden_states(
        self, token_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], plan: AttentionPlan
    ) -> Float[Tensor, "B T H"]:
        """See `LanguageModel`; the output head carries no adapter."""
        with without_adapters(self.model):
            return super().hidden_states(token_ids, positions, plan)


def check_adapters(source: ModelSource, settings: Lora | None) -> None:
    """Raise UsageError where adapters cannot be put on the model that was found; its weights are not needed."""
    if settings is not None:
        _inject(skeleton(source.config, source.trusted), settings)


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a config without any weights."""
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    model: PreTrainedModel = made
    return model


def add_adapters(policy: LanguageModel, settings: Lora | None, seed: int) -> LanguageModel:
    """Put adapters on the policy's model, in place, and freeze everything else; the policy itself where there are no
    settings.

    A is uniform within ±1/√inputs, as peft has it, from a random stream of its own that `seed` decides; B is 0. Both
    are float32, or float64 for a policy of that dtype.
    """
    if settings is None:
        return policy
    model, wide = policy.model, torch.promote_types(policy.dtype, torch.float32)
    model.requires_grad_(False)
    narrow_products(model, policy.dtype)
    _inject(model, settings)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        down, up = layer.lora_A[_NAME], layer.lora_B[_NAME]
        start = torch.rand(down.weight.shape, generator=generator).mul_(2).sub_(1).div_(down.in_features**0.5)
        down.weight = nn.Parameter(start.to(policy.device, wide))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=wide, device=policy.device))
    model.eval()
    policy.generation.advance()
    body = None
    if policy.body is not None and wide == policy.dtype:  # in bfloat16 the sum would round small adapters away
        body = FusedBody(policy.body.decoder, policy.body.layers, policy.generation, _current_weight)
    return AdaptedModel(**{field.name: getattr(policy, field.name) for field in fields(policy)} | {"body": body})


def _current_weight(layer: Any) -> Tensor:
    return merged_weight(layer) if hasattr(layer, "base_layer") else layer.weight


def _inject(model: PreTrainedModel, settings: Lora) -> None:
    """Put adapters without values on the model. Raises UsageError where peft adapts other layers than are meant."""
    meant = _layers(model, settings)
    # Made without memory, so that neither time nor global random numbers go into values that are replaced.
    _peft().inject_adapter_in_model(lora_config(model, settings), model, low_cpu_mem_usage=True)
    if odd := sorted(meant.keys() ^ adapted_layers(model).keys()):
        raise UsageError(
            f"model.lora.targets = {settings.targets!r}: peft does not adapt exactly these layers of architecture "
            f"{model.config.model_type!r} ({odd[0]}, …); write a list of targets without it"
        )


def lora_config(model: PreTrainedModel, settings: Lora) -> LoraConfig:
    """The settings in peft's form, for a model that has no adapters yet."""
    layers = _layers(model, settings)
    ends = {name.rpartition(".")[2] for name in layers} if settings.targets == "all-linear" else set(settings.targets)
    reached = {name for name, _ in model.named_modules() if _ends_with_one(name, ends)}
    config: LoraConfig = _peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=sorted(ends if reached == layers.keys() else layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    return config


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UsageError(
            f"model.lora: needs peft, which cannot be imported ({error}); run: pip install 'gruppo[lora]'"
        ) from error


def _layers(model: PreTrainedModel, settings: Lora) -> dict[str, nn.Module]:
    """The layers that are to carry adapters, by name. Raises UsageError where a target is the name of none."""
    inside = {id(module) for module in model.get_decoder().modules()}
    fused = any(name.endswith(".gate_up_proj") for name, _ in model.named_parameters())
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) in inside
        and not (fused and name.rpartition(".")[2] in _NAMES_OF_EXPERTS)
    }
    if settings.targets == "all-linear":
        return linear
    for target in settings.targets:
        if not any(_ends_with_one(name, [target]) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UsageError(
                f"model.lora.targets = {settings.targets}: no layer of this model that can carry an adapter ends in "
                f'"{target}" (its output head cannot); write "all-linear", or some of: {known}'
            )
    return {name: module for name, module in linear.items() if _ends_with_one(name, settings.targets)}


def _ends_with_one(name: str, ends: Any) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by name; none in a model without adapters."""
    return {name: each for name, each in model.named_modules() if isinstance(getattr(each, "lora_A", None), nn.Module)}


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """W + alpha/rank · B·A of a layer that carries an adapter, in its own layout (`Conv1D` has inputs × outputs).

    float32 (float64 in proofs), also inside `LanguageModel.precision`; the same whether adapters are on or off.
    """
    weight: Tensor = layer.base_layer.weight
    with torch.autocast(weight.device.type, enabled=False):
        added: Tensor = layer.get_delta_weight(_NAME)
    return added + weight


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """What `named_weights` would give of the model with every adapter merged: float32 (float64 in proofs), but for
    buffers of integers."""
    return dict(_merged_one_by_one(model))


def _merged_one_by_one(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    carriers = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(model).items()}
    adapters = trained_weights(model)
    for name, tensor in named_weights(model).items():
        if name not in adapters:
            merged = merged_weight(carriers[name]) if name in carriers else _wide(tensor)
            yield name.replace(".base_layer.", "."), merged


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is what it was before it got adapters, exactly."""
    on = [layer for layer in adapted_layers(model).values() if not layer.disable_adapters]
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def save_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the model's adapter in peft's format; `base`: the name of the model that it is for."""
    config: Any = model.peft_config[_NAME]
    write_adapter(config, trained_weights(model), folder, base)


def write_adapter(config: LoraConfig, weights: Mapping[str, Tensor], folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, from weights named as in a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    written = copy.copy(config)
    written.base_model_name_or_path, written.inference_mode = base, True
    written.save_pretrained(str(folder))
    held = {f"base_model.model.{name}".replace(f".{_NAME}.", "."): each for name, each in weights.items()}
    held = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
