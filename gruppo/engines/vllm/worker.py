"""Runs inside vLLM's worker process: loads weights by name on the CPU.

vLLM's CPU build packs the weight of each linear layer into a copy for oneDNN and drops the original. A later load then
finds no weight to write to, or leaves the packed copy as it was. Here the originals are kept, and packed again after
each load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader.utils import process_weights_after_loading

Named = tuple[str, str, Sequence[int], bytes]  # name, dtype, shape and values of a tensor

_pack = utils.dispatch_cpu_unquantized_gemm


def _pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Pack a layer's weight and keep the original, whatever `remove_weight` says."""
    _pack(layer, remove_weight=False)


class WeightLoader:
    """Methods that vLLM adds to its worker; see `worker_extension_cls` in vLLM's documentation."""

    model_runner: Any
    device: torch.device
    gruppo_loaded: set[str]

    def gruppo_start_load(self) -> None:
        """Begin a load."""
        self.gruppo_loaded = set()

    def gruppo_load(self, tensors: Sequence[Named]) -> None:
        """Load some tensors by their names in the saved model."""
        weights = [(name, _tensor(dtype, shape, values)) for name, dtype, shape, values in tensors]
        self.gruppo_loaded |= set(self.model_runner.model.load_weights(iter(weights)))

    def gruppo_finish_load(self) -> None:
        """Pack the new weights. Raises ValueError if a parameter got no weight."""
        model = self.model_runner.model
        missing = sorted(dict(model.named_parameters()).keys() - self.gruppo_loaded)
        if missing:
            raise ValueError(f"weights of {missing[0]!r}: missing")
        process_weights_after_loading(model, self.model_runner.model_config, self.device)


def _tensor(dtype: str, shape: Sequence[int], values: bytes) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).view(*shape)


utils.dispatch_cpu_unquantized_gemm = _pack_and_keep  # vLLM imports this module before it loads the model
