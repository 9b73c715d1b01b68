"""The weights of the leader's models for the other ranks: each rank's rows of every weight.

Only the leader reads the files of a model, so all ranks have the same weights whatever they come from, and only the
leader ever holds a model as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gruppo.models.value_head import ScalarModel
from gruppo.training.shard_files import local_tensor, own_rows


def bare(model: ScalarModel) -> ScalarModel:
    """The model without its fused decoder."""
    return replace(model, policy=replace(model.policy, body=None))


@torch.no_grad()
def send_weights(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Send every parameter and buffer of a module that is not sharded yet, one at a time."""
    for tensor in _tensors(module):
        dist.broadcast(tensor.detach().cpu().contiguous(), group=group, group_src=0)


@torch.no_grad()
def receive_weights(module: nn.Module, device: torch.device, group: dist.ProcessGroup) -> None:
    """Receive what the leader sends, and keep this rank's rows. The sharded module gets memory on the device first."""
    module.to_empty(device=torch.device(device.type))
    for tensor in _tensors(module):
        whole = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
        dist.broadcast(whole, group=group, group_src=0)
        first, count = own_rows(tensor)
        local_tensor(tensor).copy_(whole[first : first + count] if whole.ndim else whole)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
