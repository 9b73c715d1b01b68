"""Objects with modules as a pickle without weights, for another process of the same run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gruppo.models.attention.interface import Layer
from gruppo.models.fused_decoder import FusedBody
from gruppo.models.policy import LanguageModel


def described(models: object, device: str = "meta", keep_buffers: bool = False) -> bytes:
    """Objects with modules as a pickle without weights. Tied weights stay tied.

    Unpickled, parameters are empty tensors on `device`, and so are all other tensors unless `keep_buffers`.
    """
    stream = io.BytesIO()
    _WithoutWeights(stream, device, keep_buffers).dump(models)
    return stream.getvalue()


class _WithoutWeights(pickle.Pickler):
    """Pickles tensors as empty tensors of the same shape."""

    def __init__(self, stream: io.BytesIO, device: str, keep_buffers: bool) -> None:
        super().__init__(stream)
        self.device, self.keep_buffers = device, keep_buffers

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, nn.Parameter):
            return _parameter, (tuple(value.shape), value.dtype, value.requires_grad, self.device)
        if isinstance(value, Tensor) and not self.keep_buffers:
            return _tensor, (tuple(value.shape), value.dtype, self.device)
        return NotImplemented


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, trained: bool, device: str) -> nn.Parameter:
    return nn.Parameter(_tensor(shape, dtype, device), requires_grad=trained)


def sampling_blueprint(policy: LanguageModel, device: str) -> tuple[bytes, LanguageModel]:
    """A copy of a policy for an engine in another process, which receives weights there; see `built`.

    Also returns the copy itself, whose weights are on the device "meta". Adapters are left out: the engine receives
    merged weights. `device`: where the other process keeps its weights.
    """
    layers = None if policy.body is None else policy.body.layers
    empty: LanguageModel = pickle.loads(described(replace(policy, body=None, root=None), keep_buffers=True))
    copy = empty.sampling_copy()
    return described((copy, layers), device, keep_buffers=True), copy


def built(blueprint: bytes) -> LanguageModel:
    """The model of a `sampling_blueprint`. Its weights have no values yet."""
    policy: LanguageModel
    layers: Sequence[Layer] | None
    policy, layers = pickle.loads(blueprint)
    if layers is None:
        return policy
    return replace(policy, body=FusedBody(policy.model.get_decoder(), layers, policy.generation))
