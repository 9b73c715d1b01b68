"""Joining the ranks that torchrun, or another launcher with its environment variables, has started."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from gruppo.cluster.pulse import BEAT_SECONDS, Pulse, Store
from gruppo.config.recipe import Recipe
from gruppo.errors import RunError, UsageError, error_line, first_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
            "RECIPE`, or write trainers = 1"
        )
    raise UsageError(f"{field}: WORLD_SIZE = {started}, so {started} processes were started; make the two equal")


@contextmanager
def joined(recipe: Recipe) -> Iterator[ProcessRanks]:
    """The ranks of a recipe with several trainers, of which this process is one, for the duration of the block.

    If the connection to another rank is lost, RunError is raised in the block's place, on rank 0 with the rank that has
    ended or is silent, and why if that rank has said so. The other ranks end without a word then, except that rank 1
    says that rank 0 is lost. At the end of the leader's block, the followers are told to end.
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
    mesh = make_mesh("cuda" if accelerated else "cpu", settings.shards or dist.get_world_size(), patience)
    leads = dist.get_rank() == 0
    group = dist.new_group(backend="gloo", timeout=patience)
    # An announcement of the leader is sent once the followers take it. They wait for the next one as long as it lives.
    announcements = dist.new_group(backend="gloo", timeout=patience if leads else FOREVER)
    ranks = ProcessRanks(group, announcements, mesh)
    if not leads:  # a signal to all ranks is the leader's to handle: it saves the run and ends the others
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    pulse = Pulse(_own_store(patience), ranks.rank, ranks.size, min(BEAT_SECONDS, settings.patience / 10))

    def lost(words: str) -> NoReturn:
        """End a follower, whose main thread waits for the leader in an exchange that nothing else ends."""
        if pulse.speaks:
            os.write(2, f"gruppo: rank {ranks.rank}: {words}; resume with --resume\n".encode())
        os._exit(1)

    with pulse.beating(settings.patience, None if leads else lost):
        reached = True
        try:
            yield ranks
        except Exception as error:
            if not _is_lost(error):
                pulse.leave("" if leads else error_line(error))  # the leader says it itself
                raise
            reached = False
            pulse.leave("")
            words = pulse.account()
            if not leads and not (words and pulse.speaks):
                raise SystemExit(1) from None
            if not words:
                words = f"another rank has ended, or was silent for more than {settings.patience:g} s"
            raise RunError(
                f"rank {ranks.rank}: {words} (cluster.patience = {settings.patience:g}): {first_line(error)}; more is "
                "in the output of that rank; resume with --resume"
            ) from error
        finally:
            with suppress(RuntimeError):
                if leads and reached:
                    ranks.end()
            dist.destroy_process_group()


def _own_store(patience: timedelta) -> Store:
    """The store of the launcher through a connection of its own, which threads can use while others wait."""
    dist: Any = importlib.import_module("torch.distributed")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun can start all ranks again
    prefixed: Store = dist.PrefixStore(f"gruppo/{attempt}", store)
    return prefixed


def make_mesh(device: str, shards: int, patience: timedelta) -> DeviceMesh:
    """All ranks as copies of the weights, each sharded over `shards` ranks. No exchange in it waits longer than
    `patience`."""
    import torch.distributed as dist

    size = dist.get_world_size()
    shape = (size,) if shards == size else (size // shards, shards)
    mesh = dist.device_mesh.init_device_mesh(device, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    for group in mesh.get_all_groups():  # torch gives groups of a part of the ranks a timeout of its own
        dist.distributed_c10d._set_pg_timeout(patience, group)
    return mesh


def _is_lost(error: Exception) -> bool:
    """Whether an error says that a rank cannot be reached."""
    import torch.distributed as dist

    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "Gloo", "NCCL"))
