"""How weights get from the trainer into vLLM.

On CUDA, vLLM's own weight transfer is used: handles of memory on one device, NCCL between two. Its CPU build cannot
reload weights (`reload_weights` succeeds and leaves garbage), so there they are sent by name; see `worker`.

The CUDA path follows vLLM's documentation. It has not been run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource

BUCKET_BYTES = 64 * 2**20  # of one message; a larger tensor is a message of its own


class Transfer(Protocol):
    """Sends weights to vLLM."""

    def send(self, source: WeightSource) -> None:
        """Replace vLLM's weights by these."""


def choose_transfer(llm: Any, policy: LanguageModel, settings: EngineTable, devices: int = 1) -> Transfer:
    """The transfer for the device of the policy and the devices of vLLM, which are several only in a fleet."""
    if policy.device.type == "cpu" or devices > 1:
        return ByName(llm, policy.dtype)
    return ByTransferApi(llm, policy.dtype, shared=settings.device is None)


@dataclass
class ByName:
    """Sends tensors to the process of vLLM's worker, which loads them by name. `dtype`: vLLM's."""

    llm: Any
    dtype: torch.dtype

    def send(self, source: WeightSource) -> None:
        """See `Transfer`. At most one bucket of tensors is in memory."""
        self.llm.collective_rpc("gruppo_start_load")
        for bucket in _buckets(source, self.dtype):
            self.llm.collective_rpc("gruppo_load", args=(bucket,))
        self.llm.collective_rpc("gruppo_finish_load")


def _buckets(source: WeightSource, dtype: torch.dtype) -> Iterator[list[tuple[str, str, list[int], bytes]]]:
    bucket: list[tuple[str, str, list[int], bytes]] = []
    size = 0
    for name, tensor in cast_weights(source, dtype):
        values = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if bucket and size + len(values) > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), values))
        size += len(values)
    if bucket:
        yield bucket


def cast_weights(source: WeightSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights in vLLM's dtype. Tensors of integers stay as they are."""
    for name, tensor in source:
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


class ByTransferApi:
    """Sends weights with vLLM's weight transfer: CUDA IPC on a shared device, else NCCL."""

    def __init__(self, llm: Any, dtype: torch.dtype, shared: bool) -> None:
        self.llm, self.dtype, self.shared = llm, dtype, shared
        self._current: WeightSource | None = None
        self._sender: Any = None

    def send(self, source: WeightSource) -> None:
        """See `Transfer`. A transfer that fails is ended, or vLLM would refuse the next one."""
        self._current = source
        if self._sender is None:
            self._sender = self._connect()
        try:
            self._sender.send_weights()
        except Exception:
            with suppress(Exception):  # the first error counts
                self.llm.finish_weight_update()
            raise
        finally:
            self._current = None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        assert self._current is not None
        return cast_weights(self._current, self.dtype)

    def _connect(self) -> Any:
        """Open the channel to vLLM, once."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        if self.shared:
            info: Any = IPCTrainerInitInfo(rank=0, packed=True)
        else:
            info = NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=get_open_port(), world_size=2, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=_Client(self.llm), source=_source(self._tensors))


def _source(tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> Any:
    """A source in vLLM's terms."""
    from vllm.distributed.weight_transfer.base import ParamMeta
    from vllm.distributed.weight_transfer.base import WeightSource as VllmSource

    class Source(VllmSource):  # type: ignore[misc, unused-ignore]
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return tensors()

    return Source()


@dataclass
class _Client:
    """The calls that vLLM's sender makes to its receiver, which is a child of this process."""

    llm: Any

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)
