"""Low-rank adapters (LoRA) on a policy, in place, with peft, which is imported only when an adapter is created.

W becomes W + alpha/rank · B·A. A and B are float32, and only they are trained. B starts at 0, so the start policy
equals the model. The reference policy is the same model with its adapters turned off, without a second copy of the
weights. Frozen weights of linear layers are stored in the compute dtype, which is what the policy computes with, or in
4 bits. Merging adds to the stored weights; of 4 bits, to the numbers that they stand for.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
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
from gruppo.models.four_bit import check_layers, check_package, full_weight, is_four_bit, quantize_layers
from gruppo.models.fused_decoder import FusedBody
from gruppo.models.loading import ModelSource
from gruppo.models.policy import LanguageModel, narrow_products
from gruppo.models.weights import WeightSource, named_weights, trained_weights
from gruppo.utils.hub import split_revision

if TYPE_CHECKING:
    from peft import LoraConfig

_NAME = "default"  # peft's default adapter name


# If experts are stored as one tensor, peft takes these names for the linear layers that the experts used to be, even if
# a dense layer next to the experts has such a name.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class AdaptedModel(LanguageModel):
    """A language model whose linear layers have adapters.

    The adapters are applied separately, except in float32, where the fused body samples with merged weights.
    """

    def frozen_copy(self) -> LanguageModel:
        """The same modules with their adapters turned off. Nothing is copied, and updates do not change its results."""
        return _WithoutAdapters(**{field.name: getattr(self, field.name) for field in fields(self)} | {"body": None})

    def sampling_copy(self) -> LanguageModel:
        """See `LanguageModel`. The copy has no adapters; the weights that it receives are merged."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        for name, layer in adapted_layers(model).items():
            model.set_submodule(name, layer.base_layer)
        return self._for_sampling(model)

    def float64_copy(self) -> LanguageModel:
        """See `LanguageModel`. Weights of 4 bits become the numbers that they stand for."""
        if not any(map(is_four_bit, self.model.parameters())):
            return super().float64_copy()
        model = copy.deepcopy(self.model)
        for layer in adapted_layers(model).values():
            small = layer.base_layer
            layer.base_layer = nn.Linear(small.in_features, small.out_features, small.bias is not None, device="meta")
            layer.base_layer.weight, layer.base_layer.bias = nn.Parameter(full_weight(small.weight)), small.bias
        return LanguageModel.float64_copy(replace(self, model=model))

    def weights(self) -> dict[str, Tensor]:
        """The weights of the saved model: merged, with the names of a model without adapters."""
        return merged_weights(self.model)

    def weight_source(self) -> WeightSource:
        """The merged weights, one tensor at a time."""
        return WeightSource(self.model, lambda: _merged_one_by_one(self.model), self)


@dataclass(frozen=True)
class _WithoutAdapters(AdaptedModel):
    def score_tokens(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """See `LanguageModel`. Sharded weights are read through the module of the policy, which has its adapters on."""
        with without_adapters(self.model):
            return super().score_tokens(*arguments)

    def hidden_states(
        self, token_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], plan: AttentionPlan
    ) -> Float[Tensor, "B T H"]:
        """See `LanguageModel`. The output head has no adapter."""
        with without_adapters(self.model):
            return super().hidden_states(token_ids, positions, plan)


def check_adapters(source: ModelSource, settings: Lora | None) -> None:
    """Raise UsageError if adapters cannot be added to this model. Needs no weights."""
    if settings is not None:
        model = skeleton(source.config, source.trusted)
        if settings.base == "4bit":
            check_package('model.lora.base = "4bit"')
            check_layers(_layers(model, settings))
        _inject(model, settings)


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a config, without weights."""
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    model: PreTrainedModel = empty
    return model


def add_adapters(policy: LanguageModel, settings: Lora | None, seed: int) -> LanguageModel:
    """Add adapters to the policy's model, in place, and freeze all other weights.

    Returns the policy unchanged if `settings` is None. A is uniform within ±1/√inputs, as in peft, from its own random
    stream seeded with `seed`. B is 0. Both are float32, or float64 for a float64 policy. With `settings.base = "4bit"`,
    W is rounded to 4 bits first (see `quantize_layers`), so the start policy is not quite the model.
    """
    if settings is None:
        return policy
    model, dtype = policy.model, torch.promote_types(policy.dtype, torch.float32)
    model.requires_grad_(False)
    four_bit = settings.base == "4bit"
    if four_bit:
        quantize_layers(model, _layers(model, settings), policy.dtype)
    narrow_products(model, policy.dtype)
    _leave_file(model, policy.dtype)
    _inject(model, settings)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        down, up = layer.lora_A[_NAME], layer.lora_B[_NAME]
        start = torch.rand(down.weight.shape, generator=generator).mul_(2).sub_(1).div_(down.in_features**0.5)
        down.weight = nn.Parameter(start.to(policy.device, dtype))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=dtype, device=policy.device))
    model.eval()
    policy.generation.advance()
    body = None
    if (
        policy.body is not None and dtype == policy.dtype and not four_bit
    ):  # in bfloat16, rounding of the sum would lose small adapters
        body = FusedBody(policy.body.decoder, policy.body.layers, policy.generation, _current_weight)
    return AdaptedModel(**{field.name: getattr(policy, field.name) for field in fields(policy)} | {"body": body})


def _leave_file(model: PreTrainedModel, narrow: torch.dtype) -> None:
    """Copy the tensors that `narrow_products` has left. On a CPU, they are in the memory of the file that they were
    read from, and as long as one of them is, the whole file stays in memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != narrow and tensor.device.type == "cpu" and not is_four_bit(tensor):
            tensor.data = tensor.data.clone()


def _current_weight(layer: Any) -> Tensor:
    return merged_weight(layer) if hasattr(layer, "base_layer") else layer.weight


def _inject(model: PreTrainedModel, settings: Lora) -> None:
    """Add adapters without values to the model. Raises UsageError if peft adapts other layers than requested."""
    expected = _layers(model, settings)
    config: Any = lora_config(model, settings)
    if any(map(is_four_bit, model.parameters())):
        vars(model)["is_loaded_in_4bit"] = True  # peft asks for it
    # Created without memory: the values are replaced, so this saves time and leaves the global random state unchanged.
    _peft().inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    if unexpected := sorted(expected.keys() ^ adapted_layers(model).keys()):
        raise UsageError(
            f"model.lora.targets = {settings.targets!r}: peft does not adapt exactly these layers of architecture "
            f"{model.config.model_type!r} ({unexpected[0]}, …); write a list of targets without it"
        )


def lora_config(model: PreTrainedModel, settings: Lora) -> LoraConfig:
    """The settings as a peft config, for a model that has no adapters yet."""
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
    """The layers to add adapters to, by name. Raises UsageError if a target matches no layer."""
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
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UsageError(
                f"model.lora.targets = {settings.targets}: no layer of this model that can have an adapter ends in "
                f'"{target}" (its output head cannot); write "all-linear", or some of: {names}'
            )
    return {name: module for name, module in linear.items() if _ends_with_one(name, settings.targets)}


def _ends_with_one(name: str, ends: Any) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name. Empty for a model without adapters."""
    return {
        name: module for name, module in model.named_modules() if isinstance(getattr(module, "lora_A", None), nn.Module)
    }


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """W + alpha/rank · B·A of a layer with an adapter, in the layout of the layer (`Conv1D`: inputs × outputs).

    The result is float32 (or float64), even inside `LanguageModel.precision`, whether adapters are on or off.
    """
    weight = full_weight(layer.base_layer.weight)
    with torch.autocast(weight.device.type, enabled=False):
        added: Tensor = layer.get_delta_weight(_NAME)
    return added + weight


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The result of `named_weights` with all adapters merged: float32 (or float64), except integer buffers."""
    return dict(_merged_one_by_one(model))


def _merged_one_by_one(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(model).items()}
    adapters = trained_weights(model)
    for name, tensor in named_weights(model).items():
        if name not in adapters:
            merged = merged_weight(adapted[name]) if name in adapted else _to_accumulation_dtype(tensor)
            yield name.replace(".base_layer.", "."), merged


def _to_accumulation_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Turn all adapters off inside the block. The model then computes exactly what it did before it had adapters."""
    on = [layer for layer in adapted_layers(model).values() if not layer.disable_adapters]
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def save_adapter(model: PreTrainedModel, folder: Path, base: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the model's adapter in peft's format. `base`: the name of the base model. `tensors`: the adapter's weights,
    if the model has only shards of them."""
    config: Any = model.peft_config[_NAME]
    write_adapter(config, trained_weights(model) if tensors is None else tensors, folder, base)


def write_adapter(config: LoraConfig, weights: Mapping[str, Tensor], folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors. `weights` have the names they have in a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    written = copy.copy(config)
    written.base_model_name_or_path, written.revision = split_revision(base)
    written.inference_mode = True
    written.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}".replace(f".{_NAME}.", "."): tensor for name, tensor in weights.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
