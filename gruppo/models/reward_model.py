"""Reward models: loading and saving.

A reward model is a language model with a scalar head that gives the probability that a completion is correct.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from gruppo.errors import UsageError
from gruppo.models.loading import ModelSource, load_model
from gruppo.models.lora import skeleton
from gruppo.models.policy import LanguageModel
from gruppo.models.pretrained import UNDAMAGED
from gruppo.models.tokenizer_files import save_tokenizer
from gruppo.models.value_head import ScalarModel
from gruppo.models.weights import damage_of, named_weights, save_base, save_weights
from gruppo.runs.reading import read_object
from gruppo.utils.progress import Progress

NAME = "reward_model"  # name of its part of a reward


_KINDS: dict[str, tuple[str, Any]] = {
    "outcome": ("ForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "process": ("ForTokenClassification", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}


def check_kind(config: PreTrainedConfig, kind: str) -> None:
    """Raise UsageError unless transformers has a classifier class with this architecture's layers and a linear head.

    `kind`: "outcome" or "process". Needs no weights.
    """
    ending, mapping = _KINDS[kind]
    fits = type(config) in mapping
    if fits:
        target, layers = _skeleton(config, kind), skeleton(config).get_decoder()
        prefix = f"{target.base_model_prefix}."
        wanted = {name for name in target.state_dict() if name.startswith(prefix)}
        fits = wanted == {prefix + name for name in layers.state_dict()} and _linear(target, prefix)
    if not fits:
        raise UsageError(
            f"reward_model.name: transformers has no …{ending} class for architecture {config.model_type!r} "
            f"that consists of its layers and a linear head, the format of a model of kind {kind!r}; use another "
            "architecture (Llama, Qwen, Mistral, …)"
        )


def _linear(target: Any, prefix: str) -> bool:
    """Whether the head is a single linear layer."""
    shapes = [list(parameter.shape) for name, parameter in target.named_parameters() if not name.startswith(prefix)]
    return [1, target.config.get_text_config().hidden_size] in shapes and len(shapes) <= 2


def is_trained(config: PreTrainedConfig) -> bool:
    """Whether this is the config of a reward model, not of a language model without a head."""
    return any(str(name).endswith(ending) for name in config.architectures or () for ending, _ in _KINDS.values())


def kind_of(name: str) -> str:
    """The kind of the reward model in a folder. Raises UsageError if the folder has none."""
    file = Path(name) / "config.json"
    classes = read_object(file).get("architectures") if file.is_file() else None
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    for kind, (ending, _) in _KINDS.items():
        if first.endswith(ending):
            return kind
    raise UsageError(
        f"--reward-model {name}: is not a reward model; write the folder of one, e.g. runs/NAME/reward_model"
    )


def load_reward_model(
    source: ModelSource,
    kind: str,
    device: str,
    dtype: str,
    progress: Progress | None = None,
    attention: str = "auto",
) -> ScalarModel:
    """Load a reward model: a saved one, or a language model with a zero-initialized scalar head.

    Raises UsageError if the saved reward model is of the other kind, has more than one label, or cannot be loaded.
    """
    check_kind(source.config, kind)
    ending, _ = _KINDS[kind]
    if not is_trained(source.config):
        return ScalarModel.on(load_model(source, device, dtype, progress, attention), bias=kind == "process")
    class_name = str((source.config.architectures or [""])[0])
    if not class_name.endswith(ending):
        raise UsageError(f"reward_model.kind = {kind!r}: {source.location} is a {class_name}; write the other kind")
    if source.config.num_labels != 1:
        raise UsageError(
            f"reward_model.name = {source.location!r}: has {source.config.num_labels} labels; use a model with one, "
            'or write reward.functions = ["classifier"]'
        )
    layers, head = _parts(source, kind)
    in_memory = replace(source, given=layers, owned=True)
    model = ScalarModel.on(load_model(in_memory, device, dtype, progress, attention), bias=kind == "process")
    with torch.no_grad():
        for target, saved in zip((model.head.weight, model.head.bias), head, strict=False):
            if target is not None:
                target.copy_(saved)
    return model


def _parts(source: ModelSource, kind: str) -> tuple[Any, list[Tensor]]:
    """The language model in a reward model's folder, and the tensors of the reward model's head.

    The language model's output head is never read and is zero.
    """
    try:
        loaded: Any = _KINDS[kind][1][type(source.config)].from_pretrained(
            source.location,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # third-party files can fail in any way
        raise UsageError(
            f"reward_model.name = {source.location!r}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    classifier, report = loaded
    if missing := sorted(map(str, report["missing_keys"])):
        raise UsageError(
            f"reward_model.name = {source.location!r}: the weights {missing[0]} are missing; use a complete model"
        )
    if damage := damage_of(classifier):
        raise UsageError(f"reward_model.name = {source.location!r}: its weights are damaged: {damage}; {UNDAMAGED}")
    named = dict(classifier.state_dict())
    model = skeleton(source.config)
    place = next(name for name, module in model.named_modules() if module is model.get_decoder())
    model.set_submodule(place, getattr(classifier, classifier.base_model_prefix))  # a copy would take memory again
    output: Any = model.get_output_embeddings()
    for name, parameter in list(output.named_parameters(recurse=False)):
        setattr(output, name, nn.Parameter(torch.zeros(parameter.shape)))
    model.tie_weights()
    return model, [named[name].detach() for name in _head_names(source.config, kind)]


def _skeleton(config: PreTrainedConfig, kind: str) -> Any:
    _, mapping = _KINDS[kind]
    with torch.device("meta"):
        return mapping[type(config)](_described(config, kind))


def _head_names(config: PreTrainedConfig, kind: str) -> list[str]:
    """Names of the weight and the bias, if any, of the head."""
    model = _skeleton(config, kind)
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    return sorted(names, key=lambda name: name.endswith("bias"))


def _described(config: PreTrainedConfig, kind: str) -> PreTrainedConfig:
    described = copy.deepcopy(config)
    described.num_labels = 1
    described.architectures = [_KINDS[kind][1][type(config)].__name__]
    return described


def save_reward_model(model: ScalarModel, kind: str, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write weights, config and tokenizer to a folder that transformers can load.

    The class is AutoModelForSequenceClassification for an outcome model, AutoModelForTokenClassification for a process
    model. transformers reads a sequence at its last token that is not padding. If the padding token also ended turns,
    the position that the model was trained at would be skipped. So another padding token is written into config and
    tokenizer. `tensors`: the weights of the model's module by name, if it has only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = model.policy
    config = _described(policy.model.config, kind)
    target = _skeleton(config, kind)
    prefix = f"{target.base_model_prefix}."
    tensors = named_weights(model.module) if tensors is None else tensors
    weights = {prefix + name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")}
    head = [tensors[name] for name in ("score.weight", "score.bias") if name in tensors]
    weights |= zip(_head_names(config, kind), head, strict=False)
    save_base(policy, folder)
    tokenizer = copy.deepcopy(policy.tokenizer)
    config.pad_token_id = _padding(policy)
    if config.pad_token_id is not None:
        tokenizer.pad_token_id = config.pad_token_id
    save_tokenizer(tokenizer, folder)
    config.save_pretrained(folder)
    save_weights({name: tensor.detach() for name, tensor in weights.items()}, folder)


def _padding(policy: LanguageModel) -> int | None:
    """A special token that does not end a turn, or None if there is none."""
    padding = policy.tokenizer.pad_token_id
    special = [padding, policy.tokenizer.unk_token_id, policy.tokenizer.bos_token_id, *policy.tokenizer.all_special_ids]
    return next((int(token) for token in special if token is not None and token not in policy.eos_ids), None)
