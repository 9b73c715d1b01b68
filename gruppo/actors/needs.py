"""What processes of Ray need: Ray itself, a token, devices, and room for weights. Known without Ray."""

from __future__ import annotations

import os

import torch

from gruppo.config.cluster_section import LOCAL, Cluster
from gruppo.errors import UsageError
from gruppo.utils.imports import installed
from gruppo.utils.system import visible_devices

LEAST_STORE = 200 * 2**20  # bytes of Ray's object store; Ray accepts no fewer than 75 MB
VERSIONS = 2.5  # of the weights that fit into the object store: the new one, the old one, and room between objects
ACTOR_CPUS = 1  # that Ray reserves for each engine, and for each rank that it starts
START_SECONDS = 300.0  # a process has at least this long to start, whatever the patience


def check_ray(cluster: Cluster, device: torch.device, field: str, otherwise: str, followers: int = 0) -> None:
    """Raise UsageError if Ray is missing, or may not be used as the recipe says. Starts nothing.

    `field`: what needs Ray; `otherwise`: what to do without it. `followers`: ranks that Ray is to start.
    """
    if not installed("ray"):
        raise UsageError(f'{field}: Ray is not installed; run: pip install "gruppo[cluster]", or {otherwise}')
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{field}: Ray has no devices of type {device.type}; {otherwise}")
    if cluster.address == LOCAL and device.type == "cuda":
        free_devices(cluster, followers)
    if cluster.address != LOCAL and os.environ.get("RAY_AUTH_MODE") != "token":
        raise UsageError(
            f'cluster.address = "{cluster.address}": whoever reaches a Ray without a token can run programs on its '
            "machines; start it and this run with RAY_AUTH_MODE=token (docs/scale.md says how)"
        )


def free_devices(cluster: Cluster, followers: int = 0) -> list[str]:
    """The CUDA devices of this machine that no rank uses which has started already. Raises UsageError if they are too
    few for the engines, and for the `followers` that Ray is to start."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, needed = visible_devices()[ranks:], cluster.engines * cluster.engine_devices + followers
    if len(free) < needed:
        fields = [f"cluster.trainers = {cluster.trainers}"] if followers else []
        fields += [f"cluster.engines = {cluster.engines}"] if cluster.engines else []
        raise UsageError(
            f"{', '.join(fields)}: needs {needed} CUDA devices besides the leader's, and this machine has {len(free)}; "
            "write fewer, or the address of a Ray with more machines in cluster.address"
        )
    return free


def store_bytes(weight_bytes: int) -> int:
    """Bytes of the object store of a Ray that is started for a run. `weight_bytes`: of one version of the weights."""
    return int(max(LEAST_STORE, VERSIONS * weight_bytes))
