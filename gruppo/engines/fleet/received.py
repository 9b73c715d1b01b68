"""What engines of a fleet receive: weights in their dtypes. Known without Ray."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights


def received_dtypes(copy: LanguageModel, elsewhere: torch.dtype | None) -> Mapping[str, torch.dtype]:
    """The dtypes in which an engine keeps weights: those of the `copy` of `sampling_blueprint`, or `elsewhere` for all
    that are not integers."""
    kept = {name: weight.dtype for name, weight in named_weights(copy.model).items()}
    return {
        name: elsewhere if elsewhere is not None and dtype.is_floating_point else dtype for name, dtype in kept.items()
    }


def received_bytes(copy: LanguageModel, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of one version of the weights in these dtypes."""
    return sum(weight.numel() * dtypes[name].itemsize for name, weight in named_weights(copy.model).items())
