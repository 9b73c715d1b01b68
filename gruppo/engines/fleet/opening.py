"""From a recipe to its fleet."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from gruppo.actors.runtime import Runtime, room
from gruppo.config.recipe import Recipe
from gruppo.engines.fleet.actor import Order
from gruppo.engines.fleet.fleet import Fleet
from gruppo.engines.fleet.parcels import Files, Objects
from gruppo.engines.fleet.received import received_bytes, received_dtypes
from gruppo.engines.probe import probed_length
from gruppo.models.blueprint import sampling_blueprint
from gruppo.models.policy import LanguageModel

FOLDER = "engine_weights"  # in the run folder


def open_fleet(policy: LanguageModel, recipe: Recipe, slots: int, length: int, folder: Path, stack: ExitStack) -> Fleet:
    """The engines of a recipe with cluster.engines, which wait for weights.

    `slots`: of each engine. `length`: the longest sequence, a prompt with its completion, in tokens. `folder`: the run
    folder. `stack` ends the engines, and Ray if it was started for them. Raises RunError if they do not start.
    """
    cluster, settings = recipe.cluster, recipe.engine
    assert cluster is not None
    accelerated, elsewhere = policy.device.type == "cuda", settings.has_own_process
    blueprint, copy = sampling_blueprint(policy, "meta" if elsewhere else policy.device.type)
    dtypes = received_dtypes(copy, policy.dtype if elsewhere else None)
    runtime = Runtime(cluster, accelerated, received_bytes(copy, dtypes))
    stack.callback(runtime.close)
    order = Order(
        blueprint=blueprint,
        settings=settings,
        slots=slots,
        length=probed_length(policy, length),
        device=policy.device.type,
        devices=cluster.engine_devices,
        threads=max(1, torch.get_num_threads() // cluster.engines) if runtime.local else torch.get_num_threads(),
    )
    way = Files(folder / FOLDER) if cluster.weights == "files" else Objects()
    stack.callback(way.close)
    fleet = Fleet(
        policy,
        [order] * cluster.engines,
        cluster.engine_devices if accelerated else 0,
        way,
        dtypes,
        cluster.patience,
        room(cluster, accelerated),
    )
    stack.callback(fleet.close)
    fleet.start()
    return fleet
