"""Joining the process group of a run's ranks, whoever has started them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore

from gruppo.cluster.pulse import BEAT_SECONDS, EndOf, Pulse
from gruppo.cluster.ranks import FOREVER, ProcessRanks
from gruppo.config.recipe import Recipe
from gruppo.errors import RunError, error_line, first_line
from gruppo.training.lost_ranks import RankLostError

INTERFACE = "GLOO_SOCKET_IFNAME"  # the environment variable that gloo reads


@dataclass(frozen=True)
class Rendezvous:
    """Where a process meets the other ranks. `store`: one that all of them reach. `device`: number of its CUDA device.
    `address`: its own address, which the others reach it at; None to leave that to torch."""

    rank: int
    size: int
    store: Any  # of torch
    device: int = 0
    address: str | None = None


def open_store(address: str, port: int, patience: timedelta, leads: bool) -> Any:
    """A store that the leader keeps, on a port of its own if `port` is 0, and that other processes reach there."""
    torch_distributed: Any = dist
    return torch_distributed.TCPStore(address, port, is_master=leads, wait_for_workers=False, timeout=patience)


def is_accelerated(recipe: Recipe) -> bool:
    """Whether ranks compute on CUDA devices."""
    return recipe.model.device in ("auto", "cuda") and torch.cuda.is_available()


@contextmanager
def joined(recipe: Recipe, meeting: Rendezvous, end_of: EndOf | None = None) -> Iterator[ProcessRanks]:
    """The ranks of a recipe with several trainers, of which this process is one, for the duration of the block.

    `end_of`: see `Pulse.account`. If the connection to another rank is lost, RankLostError is raised in the block's
    place, on rank 0 with the rank that has ended or is silent, and why if that rank has said so. The other ranks end
    without a word then, except that rank 1 says that rank 0 is lost. At the end of the leader's block, the followers
    are told to end.
    """
    settings = recipe.cluster
    assert settings is not None
    patience, leads, accelerated = timedelta(seconds=settings.patience), meeting.rank == 0, is_accelerated(recipe)
    if not leads:  # a signal to all ranks is the leader's to handle: it saves the run and ends the others
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    # A connection of its own, which threads can use while others wait.
    store = PrefixStore("gruppo", meeting.store.clone())
    pulse = Pulse(store, meeting.rank, meeting.size, min(BEAT_SECONDS, settings.patience / 10))

    def lost(words: str) -> NoReturn:
        """End a follower, whose main thread waits for the leader in an exchange that nothing else ends."""
        if pulse.speaks:
            os.write(2, f"gruppo: rank {meeting.rank}: {words}; resume with --resume\n".encode())
        os._exit(1)

    with pulse.beating(settings.patience, None if leads else lost), _hook_kept():
        ranks, reached = None, False
        try:
            ranks = _connected(meeting, settings.shards, patience, accelerated)
            reached = True
            yield ranks
        except KeyboardInterrupt:
            reached = False  # the others may be in the middle of something
            raise
        except Exception as error:
            if not _is_lost(error):
                pulse.leave("" if leads else error_line(error))  # the leader says it itself
                raise
            reached = False
            pulse.leave("")
            words = pulse.account(end_of)
            if not leads and not (words and pulse.speaks):
                raise SystemExit(1) from None
            if not words:
                words = f"another rank has ended, or was silent for more than {settings.patience:g} s"
            why = f"{words} (cluster.patience = {settings.patience:g}): {first_line(error)}"
            raise RankLostError(words, f"rank {meeting.rank}: {why}") from error
        finally:
            with suppress(RuntimeError):
                if leads and reached and ranks is not None:
                    ranks.end()
            _leave(abort=accelerated and not reached)


@contextmanager
def _hook_kept() -> Iterator[None]:
    """Restore what prints errors that nobody catches, which torch replaces: the process may go on without ranks."""
    before = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = before


def _connected(meeting: Rendezvous, shards: int, patience: timedelta, accelerated: bool) -> ProcessRanks:
    """The process groups of all ranks, once all of them have come."""
    backend = "cpu:gloo,cuda:nccl" if accelerated else "gloo"
    if accelerated:
        torch.cuda.set_device(meeting.device)
    with _bound_to(meeting.address):
        dist.init_process_group(
            backend, store=meeting.store, rank=meeting.rank, world_size=meeting.size, timeout=patience
        )
        mesh = make_mesh("cuda" if accelerated else "cpu", shards or meeting.size, patience)
        group = dist.new_group(backend="gloo", timeout=patience)
        # An announcement of the leader is sent once the followers take it. They wait for the next one as long as it
        # lives.
        announcements = dist.new_group(backend="gloo", timeout=FOREVER if meeting.rank else patience)
    return ProcessRanks(group, announcements, mesh)


def _leave(abort: bool) -> None:
    """Leave the process groups. `abort`: without waiting for what is under way on devices."""
    if not dist.is_initialized():
        return
    if abort:
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


@contextmanager
def _bound_to(address: str | None) -> Iterator[None]:
    """Let gloo use the network interface with this address, unless the user has chosen one."""
    named = psutil.net_if_addrs().items() if address is not None and INTERFACE not in os.environ else ()
    found = [name for name, addresses in named if any(one.address == address for one in addresses)]
    if found:
        os.environ[INTERFACE] = found[0]
    try:
        yield
    finally:
        if found:
            del os.environ[INTERFACE]


def make_mesh(device: str, shards: int, patience: timedelta) -> DeviceMesh:
    """All ranks as copies of the weights, each sharded over `shards` ranks. No exchange in it waits longer than
    `patience`."""
    size = dist.get_world_size()
    shape = (size,) if shards == size else (size // shards, shards)
    mesh = dist.device_mesh.init_device_mesh(device, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    for group in mesh.get_all_groups():  # torch gives groups of a part of the ranks a timeout of its own
        dist.distributed_c10d._set_pg_timeout(patience, group)
    return mesh


def _is_lost(error: Exception) -> bool:
    """Whether an error says that a rank cannot be reached."""
    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "Gloo", "NCCL"))
