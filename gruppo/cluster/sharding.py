"""Sharding of models over ranks with torch's FSDP2 (`fully_shard`).

Each decoder layer is gathered while it runs, and so is the rest of a model: embedding, last norm and output head.
Gradients are added over the ranks, not averaged, because token weights already contain the denominators of the step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from gruppo.models.policy import LanguageModel
from gruppo.models.value_head import ScalarModel
from gruppo.training.shard_files import local_tensor


def shard_policy(policy: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """Shard the policy's weights over the ranks of the mesh, in place.

    The modules of transformers compute it: the fused decoder would keep copies of the whole weights.
    """
    modules = replace(policy, body=None, sharded=True)
    root = modules.scorer
    _shard(root, modules.layers, mesh)
    return replace(modules, root=root)


def shard_scalar(model: ScalarModel, mesh: DeviceMesh) -> ScalarModel:
    """Shard a value or reward model, in place. See `shard_policy`."""
    sharded = replace(model, policy=replace(model.policy, body=None, sharded=True))
    _shard(sharded.module, sharded.policy.layers, mesh)
    return sharded


def _shard(root: nn.Module, layers: list[Any], mesh: DeviceMesh) -> None:
    for module in [*layers, root]:
        # Also the root: after a pass without gradients, its gathered weights would outlive the next optimizer step.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no product inside a sum


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every rank, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def scale_gradients(module: nn.Module, norm: float, max_norm: float) -> None:
    """Scale this rank's shards of the gradients as `torch.nn.utils.clip_grads_with_norm_` does."""
    factor = min(1.0, max_norm / (norm + 1e-6))
    for parameter in module.parameters():
        if parameter.grad is not None:
            local_tensor(parameter.grad).mul_(factor)


def gradient_norm(module: nn.Module) -> Tensor:
    """The norm of the gradients of all ranks together."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
