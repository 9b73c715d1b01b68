"""Processes for tests with several ranks. They are started once for a module of tests: that takes seconds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gruppo.cluster.ranks import ProcessRanks

PATIENCE = timedelta(seconds=60)


class Together(ProcessRanks):
    """Ranks that all run the same code, so that nothing needs to be announced."""

    @classmethod
    def of(cls, ranks: ProcessRanks) -> Together:
        """These ranks."""
        return cls(ranks.group, ranks.announcements, ranks.mesh)

    def announce(self, *_: Any) -> None:
        pass


class Team:
    """Runs functions f(ranks, *arguments) on all ranks of a number of processes."""

    def __init__(self, connections: list[Connection], processes: list[Any]) -> None:
        self.connections, self.processes = connections, processes

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, replicas: int = 1) -> list[Any]:
        """The results of `size` ranks, in order. `replicas`: how many times the weights are held (HSDP)."""
        used = self.connections[:size]
        for connection in used:
            connection.send((size, replicas, function, arguments))
        results = [self._result(rank) for rank in range(size)]
        failures = [result for failed, result in results if failed]
        assert not failures, "\n".join(failures)
        return [result for _, result in results]

    def _result(self, rank: int) -> tuple[bool, Any]:
        """What a rank sent. Raises AssertionError if its process ended."""
        connection, process = self.connections[rank], self.processes[rank]
        wait([connection, process.sentinel])
        assert connection.poll(), f"the process of rank {rank} ended with {process.exitcode}"
        return connection.recv()  # type: ignore[no-any-return]


@contextmanager
def started(size: int, folder: Path) -> Iterator[Team]:
    """A team of up to `size` ranks, forked from a process that has imported torch once for all of them."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["gruppo.cluster.follower", "gruppo.training.api", "gruppo.training.setup"])
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_serve, args=(child, rank, size, str(folder / "rendezvous")), daemon=True)
        for rank, (_, child) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    try:
        yield Team([parent for parent, _ in pairs], processes)
    finally:
        for (parent, _), process in zip(pairs, processes, strict=True):
            if process.is_alive():
                parent.send(None)
        for process in processes:
            process.join(10)
            process.kill()


def _serve(connection: Connection, rank: int, size: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=PATIENCE)
    teams = {}
    for members in range(1, size + 1):
        for replicas in {1, 2} if members % 2 == 0 else {1}:
            places = torch.arange(members).view(replicas, -1) if replicas > 1 else torch.arange(members)
            mesh = DeviceMesh("cpu", places, mesh_dim_names=("copies", "shards")[-places.ndim :])
            group, announcements = (dist.new_group(list(range(members)), timeout=PATIENCE) for _ in range(2))
            if rank < members:
                teams[members, replicas] = ProcessRanks(group, announcements, mesh)
    while (task := connection.recv()) is not None:
        members, replicas, function, arguments = task
        try:
            connection.send((False, function(teams[members, replicas], *arguments)))
        except Exception:  # noqa: BLE001  the test reports it
            connection.send((True, f"rank {rank}:\n{traceback.format_exc()}"))
