"""Weights by name: hashing and saving them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save

if TYPE_CHECKING:
    from gruppo.models.policy import LanguageModel


@dataclass(frozen=True)
class WeightSource:
    """Named tensors of a model, given one at a time, as often as it is iterated over.

    `module`: the live module that holds them, where it is in this process. An engine that samples with that very module
    has nothing to copy. Names are those of the saved model: an adapter is merged on the way.
    """

    module: nn.Module
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors()


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a saved model holds, by name: its parameters, a tied one once, and its persistent buffers (routers have
    biases that are no parameters)."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = model.state_dict().keys()
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What tells a model in training from its start, by name: everything, or its trained parameters where others are
    frozen."""
    trained = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    whole = all(each.requires_grad for each in model.parameters())
    return named_weights(model) if whole else trained


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over what a saved model holds; see `tensors_sha256`."""
    return tensors_sha256(named_weights(model))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors' bytes in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(policy: LanguageModel, folder: Path) -> None:
    """Write weights (safetensors), config, generation config and tokenizer, so that transformers loads the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(policy.weights(), folder)
    save_base(policy, folder)


def save_weights(weights: Mapping[str, Tensor], folder: Path, file: str = "model.safetensors") -> None:
    """Write a file of weights."""
    held = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(held, folder / file, metadata={"format": "pt"})


def save_base(policy: LanguageModel, folder: Path) -> None:
    """Write config, generation config and tokenizer: all of a model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(policy.model.config)
    config.architectures = [type(policy.model).__name__]  # which vLLM and others choose the model's class by
    if policy.model.is_remote_code():
        custom_object_save(policy.model, folder, config=config)  # type: ignore[arg-type]  # the Python files that it came with
    config.save_pretrained(folder)
    if policy.model.generation_config is not None:
        policy.model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
