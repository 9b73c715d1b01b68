"""The ranks of a run whose leader starts the others, through Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gruppo.actors.needs import ACTOR_CPUS, START_SECONDS
from gruppo.actors.process import Hello, cause_of_end, end_process, require_same_versions
from gruppo.actors.runtime import Runtime, room
from gruppo.cluster.joining import Rendezvous, is_accelerated, joined, open_store
from gruppo.cluster.pulse import Store
from gruppo.cluster.rank_actor import HERE, RankActor
from gruppo.config.recipe import Recipe
from gruppo.errors import RunError
from gruppo.models.ranks import ALONE, Ranks
from gruppo.training.lost_ranks import RankLostError
from gruppo.utils.cgroups import Memory
from gruppo.utils.progress import Progress
from gruppo.utils.waiting import waiting_for

ROOM_SECONDS = 60.0  # the longest that ranks which start again wait for room for all of them
NOTICE_SECONDS = 10.0  # within which Ray says that a process has ended
TURN_SECONDS = 0.2
LOOPBACK = "127.0.0.1"


@dataclass
class Follower:
    """A rank that the leader has started. `task`: what it is doing."""

    rank: int
    actor: Any
    task: Any
    hello: Hello | None = None

    def __str__(self) -> str:
        """For messages."""
        return f"rank {self.rank}" + (f" ({self.hello})" if self.hello else "")

    def cause(self, memory: Memory | None = None, seconds: float = 0.0) -> str:
        """Why its task has ended, in a line; "" if it does not end within some seconds."""
        if not ray.wait([self.task], timeout=seconds)[0]:
            return ""
        try:
            return cause_of_end(ray.get(self.task), self.hello, memory)
        except RayError as error:
            return cause_of_end(error, self.hello, memory)

    def end(self) -> None:
        """End its process."""
        end_process(self.actor, self.hello)


class StartedRanks:
    """Starts the followers of a run, which this process leads, as often as needed. All of them use one Ray, and so do
    the run's engines."""

    def __init__(self, recipe: Recipe, weight_bytes: int, progress: Progress) -> None:
        """Start or join Ray. `weight_bytes`: of one version of the weights, if the run has engines. Raises RunError."""
        assert recipe.cluster is not None
        self.recipe, self.cluster, self.progress = recipe, recipe.cluster, progress
        self.accelerated, self.size = is_accelerated(recipe), recipe.cluster.trainers
        self.runtime = Runtime(self.cluster, self.accelerated, weight_bytes, self.size - 1)
        self._again = False
        if self.accelerated:
            # After an error, NCCL ends its connections, and not this process, which starts the ranks again. What its
            # kernels leave behind then is never used: an exchange on the host follows each of them, and fails.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        self._threads = torch.get_num_threads()
        if self.runtime.local and not self.accelerated:  # the ranks share the cores of this machine
            torch.set_num_threads(max(1, self._threads // self.cluster.trainers))

    def close(self) -> None:
        """Leave Ray, and end it if it was started here."""
        torch.set_num_threads(self._threads)
        self.runtime.close()

    @contextmanager
    def joined(self) -> Iterator[tuple[Recipe, Ranks]]:
        """The ranks for the duration of the block, with the recipe for as many as there are.

        The first time, all ranks of the recipe start; later, as many as there is room for. At the end of the block the
        followers end. Raises RankLostError, also in the block's place, if one is lost.
        """
        with ExitStack() as stack:
            with self.progress.bar("Starting ranks", None, ""):
                followers = self._start(stack)
            recipe = self.recipe.on_ranks(1 + len(followers))
            if followers:
                yield recipe, stack.enter_context(self._led(recipe, followers))
            else:
                yield recipe, ALONE

    def _start(self, stack: ExitStack) -> list[Follower]:
        group, followers = self._place(), list[Follower]()
        self._again = True
        if group is None:
            return []
        stack.callback(remove_placement_group, group)
        for number in range(group.bundle_count):
            actor: Any = ray.remote(RankActor).options(
                num_cpus=ACTOR_CPUS,
                num_gpus=int(self.accelerated),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
            )
            started = actor.remote()
            followers.append(Follower(1 + number, started, started.hello.remote(os.getcwd())))
            stack.callback(followers[-1].end)
        self._greet(followers)
        return followers

    def _place(self) -> PlacementGroup | None:
        """Room for the followers, near each other. When they start again, for as many of them as possible; None if
        there is none. Raises RunError if there is not enough the first time."""
        seconds = ROOM_SECONDS if self._again else max(self.cluster.patience, START_SECONDS)
        bundle = {"CPU": float(ACTOR_CPUS)} | ({"GPU": 1.0} if self.accelerated else {})
        count = self.size - 1
        while count > 0:
            group, deadline = placement_group([bundle] * count, strategy="PACK"), time.monotonic() + seconds
            with waiting_for(f"room in Ray for {count} ranks"):
                while time.monotonic() < deadline:
                    if group.wait(TURN_SECONDS):
                        return group
            remove_placement_group(group)
            if not self._again:
                raise RunError(
                    f"cluster.trainers = {self.cluster.trainers}: no room in Ray for the ranks within {seconds:g} s; "
                    f"{self._room()}"
                )
            free = ray.available_resources()
            count = min(count - 1, *(int(free.get(kind, 0) // needed) for kind, needed in bundle.items()))
            seconds = NOTICE_SECONDS
        return None

    def _room(self) -> str:
        return room(self.cluster, self.accelerated, self.size - 1)

    def _greet(self, followers: Sequence[Follower]) -> None:
        """Wait until all processes are there."""
        seconds = max(self.cluster.patience, START_SECONDS)
        deadline, missing = time.monotonic() + seconds, list(followers)
        with waiting_for(lambda: f"{missing[0]}, which is starting"):
            while missing:
                ready, _ = ray.wait([follower.task for follower in missing], timeout=TURN_SECONDS)
                for follower in [follower for follower in missing if follower.task in ready]:
                    self._hear(follower)
                    missing.remove(follower)
                if missing and time.monotonic() > deadline:
                    raise RankLostError(f"{missing[0]} has not started within {seconds:g} s; {self._room()}")

    def _hear(self, follower: Follower) -> None:
        try:
            hello: Hello = ray.get(follower.task)
        except RayError as error:
            raise RankLostError(f"{follower} has not started: {cause_of_end(error, None, None)}") from error
        require_same_versions(hello, "cluster.trainers")
        follower.hello = hello

    @contextmanager
    def _led(self, recipe: Recipe, followers: Sequence[Follower]) -> Iterator[Ranks]:
        """Lead the followers for the duration of the block."""
        size, patience = 1 + len(followers), timedelta(seconds=self.cluster.patience)
        here = LOOPBACK if self.runtime.owned and self.runtime.local else None
        address = here or get_node_ip_address()
        store = open_store(address, 0, patience, leads=True)
        for one in followers:
            one.task = one.actor.follow.remote(recipe, one.rank, size, (address, store.port), here)
        self._await_all(store, followers)

        def end_of(rank: int, memory: Memory | None, since: str) -> str:
            follower = followers[rank - 1]
            if cause := follower.cause(memory, NOTICE_SECONDS):
                return f"{follower} has ended: {cause}"
            silent = f"is silent since {since} (cluster.patience = {self.cluster.patience:g}), so it is killed"
            return f"{follower} {cause_of_end(silent, follower.hello, memory)}"

        with joined(recipe, Rendezvous(0, size, store, address=address), end_of) as ranks:
            yield ranks

    def _await_all(self, store: Store, followers: Sequence[Follower]) -> None:
        """Wait until all followers are about to join: torch would not notice before that that one has ended."""
        deadline, missing = time.monotonic() + self.cluster.patience, list(followers)
        with waiting_for(lambda: f"{missing[0]}, which is joining"):
            while missing := [one for one in missing if not store.check([f"{HERE}/{one.rank}"])]:
                for follower in missing:
                    if cause := follower.cause():
                        raise RankLostError(f"{follower} has ended: {cause}")
                    if time.monotonic() > deadline:
                        raise RankLostError(
                            f"{follower} is silent for {self.cluster.patience:g} s while it joins, so it is killed"
                        )
                time.sleep(TURN_SECONDS)
