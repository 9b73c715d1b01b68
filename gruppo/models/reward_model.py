"""Reward models: a language model with a head that gives the probability that a completion is right. Loading and saving."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from gruppo.errors import UsageError
from gruppo.models.loading import ModelSource, load_model
from gruppo.models.lora import skeleton
from gruppo.models.policy import LanguageModel
from gruppo.models.value_head import ScalarModel
from gruppo.models.weights import save_base, save_weights
from gruppo.runs.reading import read_object
from gruppo.utils.progress import Progress

NAME = "reward_model"  # of its part of a reward


_KINDS: dict[str, tuple[str, Any]] = {
    "outcome": ("ForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "process": ("ForTokenClassification", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}


# Loading and saving.


def check_kind(config: PreTrainedConfig, kind: str) -> None:
    """Raise UsageError where transformers has no class of classifier that holds what a model of the architecture has
    and a head; weights are not needed to tell."""
    ending, mapping = _KINDS[kind]
    fits = type(config) in mapping
    if fits:
        target, layers = _skeleton(config, kind), skeleton(config).get_decoder()
        prefix = f"{target.base_model_prefix}."
        wanted = {name for name in target.state_dict() if name.startswith(prefix)}
        fits = wanted == {prefix + name for name in layers.state_dict()} and _linear(target, prefix)
    if not fits:
        raise UsageError(
            f"reward_model.name: architecture {config.model_type!r} has no …{ending} in transformers that is "
            f"its layers and a head, as which a model of kind {kind!r} is saved; use another (Llama, Qwen, Mistral, …)"
        )


def _linear(target: Any, prefix: str) -> bool:
    """Whether the head is one linear layer."""
    shapes = [list(each.shape) for name, each in target.named_parameters() if not name.startswith(prefix)]
    return [1, target.config.get_text_config().hidden_size] in shapes and len(shapes) <= 2


def is_trained(config: PreTrainedConfig) -> bool:
    """Whether a folder holds a reward model, and not a language model without a head."""
    return any(str(each).endswith(ending) for each in config.architectures or () for ending, _ in _KINDS.values())


def kind_of(name: str) -> str:
    """The kind of the reward model in a folder. Raises UsageError where there is none."""
    file = Path(name) / "config.json"
    held = read_object(file).get("architectures") if file.is_file() else None
    first = str(held[0]) if isinstance(held, list) and held else ""
    for kind, (ending, _) in _KINDS.items():
        if first.endswith(ending):
            return kind
    raise UsageError(
        f"--reward-model {name}: holds no reward model; give the folder of one, e.g. runs/NAME/reward_model"
    )


def load_reward_model(
    source: ModelSource, kind: str, device: str, dtype: str, progress: Progress | None = None
) -> ScalarModel:
    """A head on a language model's weights, of zeros, or with that of a reward model that was saved. Raises UsageError
    where that one is of the other kind."""
    check_kind(source.config, kind)
    ending, _ = _KINDS[kind]
    if not is_trained(source.config):
        return ScalarModel.on(load_model(source, device, dtype, progress), bias=kind == "process")
    held = str((source.config.architectures or [""])[0])
    if not held.endswith(ending):
        raise UsageError(f"reward_model.kind = {kind!r}: {source.location} is a {held}; write the other kind")
    if source.config.num_labels != 1:
        raise UsageError(
            f"reward_model.name = {source.location!r}: has {source.config.num_labels} labels; take a model with one, "
            'or reward.functions = ["classifier"]'
        )
    layers, head = _parts(source, kind)
    given = replace(source, given=layers)
    model = ScalarModel.on(load_model(given, device, dtype, progress), bias=kind == "process")
    with torch.no_grad():
        for own, each in zip((model.head.weight, model.head.bias), head, strict=False):
            if own is not None:
                own.copy_(each)
    return model


def _parts(source: ModelSource, kind: str) -> tuple[Any, list[Tensor]]:
    """The language model of a reward model's folder, its output head, which nothing reads, of zeros; and the tensors of
    the head that is read."""
    try:
        loaded: Any = _KINDS[kind][1][type(source.config)].from_pretrained(
            source.location,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # weights are other people's files: anything can be wrong with them
        raise UsageError(
            f"reward_model.name = {source.location!r}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    classifier, report = loaded
    if missing := sorted(map(str, report["missing_keys"])):
        raise UsageError(f"reward_model.name = {source.location!r}: has no weights for {missing[0]}; give all of it")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), trust_remote_code=False)
    prefix = f"{classifier.base_model_prefix}."
    named = dict(classifier.state_dict())
    layers = {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
    output = model.get_output_embeddings().weight
    if output is not model.get_input_embeddings().weight:
        nn.init.zeros_(output)
    model.get_decoder().load_state_dict(layers)
    return model, [named[name].detach() for name in _head_names(source.config, kind)]


def _skeleton(config: PreTrainedConfig, kind: str) -> Any:
    _, mapping = _KINDS[kind]
    with torch.device("meta"):
        return mapping[type(config)](_described(config, kind))


def _head_names(config: PreTrainedConfig, kind: str) -> list[str]:
    """Names of the head's weight and of its bias, if it has one."""
    model = _skeleton(config, kind)
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    return sorted(names, key=lambda name: name.endswith("bias"))


def _described(config: PreTrainedConfig, kind: str) -> PreTrainedConfig:
    own = copy.deepcopy(config)
    own.num_labels = 1
    own.architectures = [_KINDS[kind][1][type(config)].__name__]
    return own


def save_reward_model(model: ScalarModel, kind: str, folder: Path) -> None:
    """Write weights, config and tokenizer, so that transformers' AutoModelForSequenceClassification (an outcome model)
    or AutoModelForTokenClassification (a process model) loads the folder.

    transformers reads a sequence at its last token that is no padding: a padding token that also ends turns would hide
    the place that the model was trained at, so another one is written into config and tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = model.policy
    config = _described(policy.model.config, kind)
    target = _skeleton(config, kind)
    prefix = f"{target.base_model_prefix}."
    weights = {prefix + name: each for name, each in policy.model.get_decoder().state_dict().items()}
    head = dict(zip(_head_names(config, kind), [model.head.weight, model.head.bias], strict=False))
    weights |= {name: each for name, each in head.items() if each is not None}
    save_base(policy, folder)
    tokenizer = copy.deepcopy(policy.tokenizer)
    config.pad_token_id = _padding(policy)
    if config.pad_token_id is not None:
        tokenizer.pad_token_id = config.pad_token_id
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    save_weights({name: each.detach() for name, each in weights.items()}, folder)


def _padding(policy: LanguageModel) -> int | None:
    """A token that ends no turn, of those that the tokenizer sets apart; None where there is none."""
    held = policy.tokenizer.pad_token_id
    apart = [held, policy.tokenizer.unk_token_id, policy.tokenizer.bos_token_id, *policy.tokenizer.all_special_ids]
    return next((int(each) for each in apart if each is not None and each not in policy.eos_ids), None)
