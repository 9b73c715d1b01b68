"""Runs inside vLLM's worker process: ends it with the trainer, and loads weights by name on the CPU.

vLLM's CPU build packs the weight of each linear layer into a copy for oneDNN and drops the original. A later load then
finds no weight to write to, or leaves the packed copy as it was. Here the originals are kept, and packed again after
each load.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch import Tensor
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import current_platform

Named = tuple[str, str, Sequence[int], bytes]  # name, dtype, shape and values of a tensor

WATCH_SECONDS = 1.0

_pack = utils.dispatch_cpu_unquantized_gemm


def _pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Pack a layer's weight and keep the original, whatever `remove_weight` says."""
    _pack(layer, remove_weight=False)


class WorkerMethods:
    """Methods that vLLM adds to its worker; see `worker_extension_cls` in vLLM's documentation."""

    model_runner: Any
    device: torch.device
    gruppo_loaded: set[str]

    def gruppo_watch(self, trainer: int) -> None:
        """End vLLM's processes when the process `trainer` is gone, even if it was killed."""
        threading.Thread(target=_end_with, args=(psutil.Process(trainer), os.getppid()), daemon=True).start()

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


def _end_with(trainer: psutil.Process, parent: int) -> None:
    with suppress(psutil.NoSuchProcess):
        while trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
    if parent not in (trainer.pid, 1):
        with suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _tensor(dtype: str, shape: Sequence[int], values: bytes) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).view(*shape)


if current_platform.is_cpu():  # vLLM imports this module before it loads the model
    utils.dispatch_cpu_unquantized_gemm = _pack_and_keep
