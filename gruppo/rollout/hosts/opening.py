"""From a recipe to its reward hosts."""

from __future__ import annotations

from contextlib import ExitStack

from gruppo.actors.runtime import Runtime, room
from gruppo.config.recipe import Recipe
from gruppo.rollout.hosts.hosts import Hosts


def open_hosts(recipe: Recipe, accelerated: bool, stack: ExitStack) -> Hosts:
    """The hosts of a recipe with cluster.reward_hosts.

    `accelerated`: whether engines need CUDA devices. `stack` ends the hosts, and Ray if it was started for them. Raises
    RunError if they do not start.
    """
    cluster = recipe.cluster
    assert cluster is not None
    runtime = Runtime(cluster, accelerated and cluster.engines > 0, None if cluster.engines else 0)
    stack.callback(runtime.close)
    hosts = Hosts(cluster.reward_hosts, cluster.patience, room(cluster, accelerated))
    stack.callback(hosts.close)
    hosts.start()
    return hosts
