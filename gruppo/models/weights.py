"""Weights by name: listing, hashing and saving."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save

from gruppo.models.tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    from gruppo.models.policy import LanguageModel


@dataclass(frozen=True)
class WeightSource:
    """The named tensors of a model, produced one at a time; can be iterated over repeatedly.

    `module`: the live module that has the weights, in this process. An engine that samples with this module need not
    copy anything. Names are the names in the saved model. Adapters are merged during iteration. `scored_by`: the model
    as a whole, if it is in this process; an engine that has loaded the weights can be compared with it.
    """

    module: nn.Module
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    scored_by: LanguageModel | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors()


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a saved model, by name.

    These are its parameters, tied ones once, and its persistent buffers (routers have biases that are not parameters).
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = model.state_dict().keys()
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name: all of them, or only the trained parameters if others are frozen."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = all(parameter.requires_grad for parameter in model.parameters())
    return named_weights(model) if whole else trained


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights to a module with the same names, whose dtypes may differ. Both may be sharded, in one way."""
    weights = named_weights(source)
    for name, tensor in named_weights(target).items():
        tensor.copy_(weights[name])


def damage_of(model: nn.Module) -> str | None:
    """What shows that the weights of a model are damaged; None if nothing does.

    Values that are NaN or infinite, or zeros in all matrices. An infinite number in a buffer may be intended.
    """
    parameters = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if _not_finite(buffer)[0]}
    if problem := not_finite_in({**parameters, **buffers}):
        return problem
    matrices = [weight for weight in parameters.values() if weight.ndim > 1 and weight.numel()]
    if matrices and not any(bool(weight.any()) for weight in matrices):
        return f"all {len(matrices)} matrices contain only zeros"
    return None


def not_finite_in(tensors: Mapping[str, Tensor]) -> str | None:
    """Which tensors have values that are NaN or infinite; None if none has."""
    found = {name: counts for name, tensor in tensors.items() if any(counts := _not_finite(tensor))}
    if not found:
        return None
    first, (nans, infinities) = next(iter(found.items()))
    kinds = [f"{count:,} {kind}" for count, kind in ((nans, "NaN"), (infinities, "infinite")) if count]
    of_all = f"{' and '.join(kinds)} of {tensors[first].numel():,} values"
    others = f", and {len(found) - 1} other tensors" if len(found) > 1 else ""
    return f"{first} has {of_all}{others}"


def _not_finite(tensor: Tensor) -> tuple[int, int]:
    """How many values of a tensor are NaN, and how many are infinite."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or not tensor.numel():
        return 0, 0
    if all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):  # one pass, and no copy
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the weights of a saved model. See `tensors_sha256`."""
    return tensors_sha256(named_weights(model))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(policy: LanguageModel, folder: Path) -> None:
    """Write weights (safetensors), config, generation config and tokenizer to a folder that transformers can load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(policy.weights(), folder)
    save_base(policy, folder)


def save_weights(weights: Mapping[str, Tensor], folder: Path, file: str = "model.safetensors") -> None:
    """Write weights to a safetensors file."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def save_base(policy: LanguageModel, folder: Path) -> None:
    """Write config, generation config and tokenizer: everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(policy.model.config)
    config.architectures = [type(policy.model).__name__]  # vLLM and others select the model class by this
    if policy.model.is_remote_code():
        custom_object_save(policy.model, folder, config=config)  # type: ignore[arg-type]  # the Python files of the model
    config.save_pretrained(folder)
    if policy.model.generation_config is not None:
        policy.model.generation_config.save_pretrained(folder)
    save_tokenizer(policy.tokenizer, folder)
