"""Rows and models that a script gives to a TRL trainer, as gruppo takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from gruppo.errors import UsageError
from gruppo.models.loading import find_model
from gruppo.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
PLACEHOLDER: Row = {"prompt": [{"role": "user", "content": ""}]}  # where the environment has the prompts


def sized(dataset: Any) -> bool:
    """Whether the number of rows is known without reading them."""
    return hasattr(dataset, "__len__")


def rows_of(dataset: Any, name: str, most: int | None = None) -> Sequence[Row]:
    """The rows of a dataset, a stream or a list, at most `most` of a stream.

    `name`: of the trainer's argument. Raises UsageError for something else, for several splits, and for images.
    """
    if isinstance(dataset, str) or not isinstance(dataset, Iterable):
        raise UsageError(f"{name} = {dataset!r}: must be a dataset, or a list of rows; use datasets.load_dataset(…)")
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise UsageError(f'{name}: has the splits {splits}; give one of them, as in dataset["{next(iter(dataset))}"]')
    rows: Any = dataset if sized(dataset) else list(islice(dataset, most))
    if not len(rows):
        raise UsageError(f"{name}: has no rows; give at least one")
    first = rows[0]
    if not isinstance(first, Mapping):
        raise UsageError(f'{name}: its first row is {str(first)[:40]!r}, not a mapping; write {{"prompt": "text"}}')
    if media := [column for column in first if column in _MEDIA and first[column] is not None]:
        raise UsageError(f"{name}: has the column {media[0]}, but gruppo trains models of text; remove the column")
    return rows  # type: ignore[no-any-return]


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether the prompt of a row, or the whole row, is a list of messages."""
    return not isinstance(row.get("prompt", row.get("messages", row.get("chosen"))), str)


def lora_of(config: Any, model_type: str) -> dict[str, Any]:
    """The table [model.lora] of a peft config, for a model of this type.

    Raises UsageError for other adapters than plain LoRA.
    """
    kind = str(getattr(getattr(config, "peft_type", None), "value", type(config).__name__))
    if kind != "LORA":
        raise UsageError(f"peft_config: is of the type {kind}; gruppo trains LoRA adapters: write LoraConfig(r=16)")
    refused = {
        "use_dora": False, "use_rslora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "layers_to_transform": None, "exclude_modules": None, "target_parameters": None,
    }  # fmt: skip
    for name, neutral in refused.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None, [], {}):
            raise UsageError(
                f"peft_config: {name} = {value!r}: adapters are plain LoRA, with rank, alpha and targets; remove it"
            )
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise UsageError(
            f'peft_config: target_modules = "{targets}": write "all-linear" or a list of layer names, as in ["q_proj"]'
        )
    if targets is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        if model_type not in DEFAULTS:
            raise UsageError(
                f'peft_config: target_modules = None: peft has no default for "{model_type}"; write "all-linear"'
            )
        targets = DEFAULTS[model_type]
    listed = targets if isinstance(targets, str) else sorted(targets)
    return {"rank": config.r, "alpha": float(config.lora_alpha), "targets": listed}


def plain_model(model: Any, peft_config: Any) -> tuple[Any, Any]:
    """A model without adapters, and the config of its adapters.

    A model to which adapters have just been added is taken apart again: gruppo adds its own. Raises UsageError for a
    model with adapters that have been trained, or if there is a `peft_config` besides.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "unload"):
        return model, peft_config
    if peft_config is not None:
        raise UsageError("peft_config: the model already has adapters; give the model without them, or no peft_config")
    if any("lora_B" in name and bool(part.any()) for name, part in model.named_parameters()):
        raise UsageError(
            "model: has trained adapters; merge them with model.merge_and_unload(), and give a peft_config"
        )
    config = next(iter(model.peft_config.values()))
    return model.unload(), config


def tokenizer_for(model: str, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool) -> bool:
    """Whether a tokenizer differs from the one that comes with the model of this name.

    It does if it was made for another model, or if its chat template was changed.
    """
    if tokenizer is None:
        return False
    if str(tokenizer.name_or_path) != model:
        return True
    own: Any = find_model(model, trust_remote_code=trust_remote_code).tokenizer
    return bool(own.chat_template != tokenizer.chat_template or len(own) != len(tokenizer))


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a processing class. Raises UsageError for something that has none."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(processing_class, "tokenizer", None) or processing_class
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(f"processing_class: is a {type(tokenizer).__name__}; give the tokenizer of the model")
    return tokenizer


def load_in_memory(model: str, trust_remote_code: bool) -> PreTrainedModel:
    """A model for which the script has a tokenizer of its own."""
    from transformers import AutoModelForCausalLM

    location = find_model(model, trust_remote_code=trust_remote_code).location
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            location, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model = {model!r}: cannot be loaded ({error}); give a model on the hub or its folder"
        ) from error
    return loaded
