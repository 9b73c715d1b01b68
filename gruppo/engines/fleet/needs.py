"""What engines of a fleet need: devices, weights in their dtypes, and room in Ray. Known without Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from gruppo.config.cluster_section import Cluster
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import named_weights
from gruppo.utils.system import visible_devices

LEAST_STORE = 200 * 2**20  # bytes of Ray's object store; Ray accepts no fewer than 75 MB
VERSIONS = 2.5  # of the weights that fit into the object store: the new one, the old one, and room between objects
ENGINE_CPUS = 1  # that Ray reserves for each engine
HOST_CPUS = 1  # that Ray reserves for each reward host


def cpus_needed(cluster: Cluster) -> int:
    """CPUs that Ray reserves for engines and reward hosts."""
    return ENGINE_CPUS * cluster.engines + HOST_CPUS * cluster.reward_hosts


def free_devices(cluster: Cluster) -> list[str]:
    """The CUDA devices of this machine that no rank of the trainer uses. Raises UsageError if they are too few."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, needed = visible_devices()[ranks:], cluster.engines * cluster.engine_devices
    if len(free) < needed:
        raise UsageError(
            f"cluster.engines = {cluster.engines}: needs {needed} CUDA devices besides the trainer's, and this machine "
            f"has {len(free)}; write fewer engines, or the address of a Ray with more machines in cluster.address"
        )
    return free


def store_bytes(weight_bytes: int) -> int:
    """Bytes of the object store of a Ray that is started for a run. `weight_bytes`: of one version of the weights."""
    return int(max(LEAST_STORE, VERSIONS * weight_bytes))


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
