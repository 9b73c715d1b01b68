"""Joining the ranks that torchrun, or another launcher with its environment variables, has started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from gruppo.config.recipe import Recipe
from gruppo.errors import RunError, UsageError, first_line

if TYPE_CHECKING:
    from gruppo.cluster.ranks import ProcessRanks


def own_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process, 0 if nothing has started ranks."""
    return int(environment.get("RANK", "0")) if "WORLD_SIZE" in environment else 0


def check_launch(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError unless as many processes were started as the recipe has ranks."""
    started = int(environment.get("WORLD_SIZE", "1"))
    wanted = 1 if recipe.cluster is None else recipe.cluster.trainers
    if started == wanted and (wanted == 1 or "RANK" in environment):
        return
    if recipe.cluster is None:
        raise UsageError(
            f"WORLD_SIZE = {started}: {started} processes were started, and the recipe has no [cluster]; add "
            f"`--set cluster.trainers={started}`, or start one process"
        )
    field = f"cluster.trainers = {wanted}"
    if "RANK" not in environment:
        raise UsageError(
            f"{field}: nothing has started the ranks; run `torchrun --nproc-per-node {wanted} --no-python gruppo train "
            "RECIPE`, or leave [cluster] out"
        )
    raise UsageError(f"{field}: WORLD_SIZE = {started}, so {started} processes were started; make the two equal")


@contextmanager
def joined(recipe: Recipe) -> Iterator[ProcessRanks]:
    """The ranks of a recipe with a [cluster], of which this process is one, for the duration of the block.

    If the connection to another rank is lost, RunError is raised in the block's place. At the end of the leader's
    block, the followers are told to end.
    """
    import torch
    import torch.distributed as dist

    from gruppo.cluster.ranks import FOREVER, ProcessRanks

    settings = recipe.cluster
    assert settings is not None
    patience = timedelta(seconds=settings.patience)
    accelerated = recipe.model.device in ("auto", "cuda") and torch.cuda.is_available()
    if accelerated:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if accelerated else "gloo", timeout=patience)
    size = dist.get_world_size()
    shards = settings.shards or size
    shape = (size,) if shards == size else (size // shards, shards)
    names = ("copies", "shards")[-len(shape) :]
    mesh = dist.device_mesh.init_device_mesh("cuda" if accelerated else "cpu", shape, mesh_dim_names=names)
    group = dist.new_group(backend="gloo", timeout=patience)
    ranks = ProcessRanks(group, dist.new_group(backend="gloo", timeout=FOREVER), mesh)
    leads = ranks.rank == 0
    if not leads:  # a signal to all ranks is the leader's to handle: it saves the run and ends the others
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    try:
        yield ranks
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise RunError(
            f"rank {ranks.rank}: another rank has ended, or was silent for more than {settings.patience:g} s "
            f"(cluster.patience): {first_line(error)}; the cause is in that rank's output; resume with --resume"
        ) from error
    finally:
        with suppress(RuntimeError):
            if leads:
                ranks.end()
        dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error says that a rank cannot be reached."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "Gloo", "NCCL"))
