"""The reward hosts of a run: where its worker processes are, and what happens when a host is lost."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from gruppo.actors.needs import START_SECONDS
from gruppo.actors.process import require_same_versions
from gruppo.config.sections import Environment
from gruppo.engines.fleet.fleet import MOST_DEATHS, TURN_SECONDS, Notify
from gruppo.errors import RunError
from gruppo.rollout.hosts.actor import Answered, Host, News, Printed
from gruppo.rollout.hosts.member import Member, Pool
from gruppo.rollout.hosts.relayed import Relayed
from gruppo.rollout.hosts.sandboxes import Sandboxes
from gruppo.rollout.workers.log import LogFile
from gruppo.rollout.workers.process import Order
from gruppo.utils.waiting import waiting_for

BEAT_SECONDS = 1.0  # after which a host that has nothing to say says that
CLOSE_SECONDS = 10.0  # for hosts to end their processes


class Hosts:
    """Starts processes on several hosts, which take turns. See `Elsewhere`.

    A thread hears what hosts say, and replaces those whose process has ended or that are silent for longer than
    `patience` seconds. Their processes are lost: calls that these had not answered have to be made again, by other
    processes; see `LostError`. What has happened is reported, and errors are raised, where answers are taken.
    """

    def __init__(self, count: int, patience: float, room: str) -> None:
        """`room`: what Ray has and needs, for the message if a host finds no place."""
        self.machines, self.patience, self.room = count, patience, room
        self.untold: list[tuple[str, str]] = []  # what happened before anyone was to be notified
        self.notify: Notify = lambda kind, message: self.untold.append((kind, message))
        beat = min(BEAT_SECONDS, patience / 10)
        self.members = [Member(number, beat) for number in range(count)]
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._numbers = itertools.count()
        self._pools: list[Pool] = []
        self._events: deque[tuple[str, str]] = deque()
        self._failure: Exception | None = None
        self._without, self._last_cause = 0.0, ""
        self._starting, self._closing = True, False
        self._thread = threading.Thread(target=self._run, name="reward hosts", daemon=True)

    def start(self) -> None:
        """Start all hosts, and wait for them. Raises RunError if one does not start."""
        for member in self.members:
            member.start()
        self._thread.start()
        with waiting_for("reward hosts, which start"):
            self.wait_until(lambda: all(member.ready for member in self.members))
        self._starting = False

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds, which news of a host can change. Raises RunError if no host is left."""
        while True:
            self.report()
            with self._changed:
                if condition():
                    return
                self._changed.wait(TURN_SECONDS)

    def report(self) -> None:
        """Notify of what has happened to hosts, and raise the error that has ended the work with them."""
        while self._events:
            self.notify(*self._events.popleft())
        if self._failure is not None:
            raise self._failure

    def launcher(self, log: Path | None, memory: Callable[[int], int] | None = None) -> HostLauncher:
        """See `Elsewhere`. `memory`: the limit of a process on a machine with this memory."""
        pool = Pool(len(self._pools), None if log is None else LogFile(log), memory)
        self._pools.append(pool)
        return HostLauncher(self, pool)

    def launch(self, place: int, pool: Pool, order: Order) -> Relayed:
        """Start a process on the host of a place."""
        member = self.members[place % self.machines]
        with self.lock:
            process = Relayed(next(self._numbers), order.delay, self.lock, member.tell, self.report)
            member.add(process, pool, order)
        return process

    def sandboxes(self, settings: Environment) -> Sandboxes:
        """See `Elsewhere`."""
        return Sandboxes(self, settings)

    @contextmanager
    def running_block(self, member: Member) -> Iterator[None]:
        """A host runs a block in a sandbox. If the block raises, the host is lost."""
        with self.lock:
            member.blocks += 1
        yield
        with self.lock:
            member.blocks, member.deaths = member.blocks - 1, 0

    def close(self) -> None:
        """End all processes, then the hosts."""
        with self.lock:
            self._closing = True
            closing = [member.actor.close.remote() for member in self.members if member.ready]
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS + 2 * TURN_SECONDS)
        elif closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for member in self.members:
            if member.starts:
                member.lose("the run has ended")

    # The thread's side.

    def _run(self) -> None:
        until: float | None = None
        try:
            while until is None or (time.monotonic() < until and self._any_open()):
                self._turn()
                if self._closing and until is None:
                    until = time.monotonic() + CLOSE_SECONDS
        except Exception as error:  # noqa: BLE001  whoever waits for an answer raises it
            with self._changed:
                self._failure = error
                for member in self.members:
                    for process in member.processes.values():
                        process.wake()
                self._changed.notify_all()

    def _any_open(self) -> bool:
        return any(member.ready and not member.closed for member in self.members)

    def _turn(self) -> None:
        """Wait for news, take them, and look for hosts that are silent."""
        asked = [member for member in self.members if not member.closed]
        began = time.monotonic()
        ray.wait([member.task for member in asked], num_returns=1, timeout=TURN_SECONDS)
        passed = min(time.monotonic() - began, 2 * TURN_SECONDS)  # more, if this process was stopped itself
        answered, _ = ray.wait([member.task for member in asked], num_returns=len(asked), timeout=0)
        answers = {member.number: _answer(member.task) for member in asked if member.task in answered}
        with self._changed:
            for member in asked:
                member.silent += passed
                if member.number in answers:
                    self._hear(member, answers[member.number])
                elif member.silent > (self.patience if member.ready else max(self.patience, START_SECONDS)):
                    words = f"silent for {member.silent:.0f} s (cluster.patience), so it was killed"
                    self._lose(member, member.cause(words if member.ready else f"{words}; {self.room}"))
            self._without = 0.0 if any(member.ready for member in self.members) else self._without + passed
            if self._without > max(self.patience, START_SECONDS):
                raise RunError(
                    f"cluster.reward_hosts = {self.machines}: no host has been there for {self._without:.0f} s "
                    f"({self._last_cause or self.room}); resume with --resume when there is room for them"
                )
            self._changed.notify_all()

    def _hear(self, member: Member, answer: Any) -> None:
        if isinstance(answer, RayError):
            self._lose(member, member.cause(answer))
        elif isinstance(answer, Host):
            self._greet(member, answer)
        else:
            assert isinstance(answer, News)
            member.take(answer)
            self._take(member, answer)

    def _greet(self, member: Member, host: Host) -> None:
        require_same_versions(host.hello, "cluster.reward_hosts")
        member.greet(host)
        if member.starts > 1:
            self._events.append(
                ("reward_host_back", f"{member.name()} is back, as process {member.starts} of this run")
            )

    def _take(self, member: Member, news: News) -> None:
        for item in news.items:
            if isinstance(item, Printed):
                if log := self._pools[item.pool].log:
                    log.append(item.chunk)
            elif process := member.processes.get(item.number):
                process.hear(item)
                if process.works:
                    member.deaths = 0
                if not isinstance(item, Answered):
                    del member.processes[item.number]
        member.hear()

    def _lose(self, member: Member, cause: str) -> None:
        """Replace a host. Raises RunError if it has ended too often without any use, or has not started at first."""
        name, was_ready = member.name(), member.ready
        self._last_cause = f"{name}: {cause}"
        calling = member.lose(cause)
        if self._closing:
            member.closed = True
            return
        if self._starting:
            raise RunError(f"cluster.reward_hosts: {self._last_cause}")
        if member.deaths >= MOST_DEATHS:
            raise RunError(f"{name} has ended {MOST_DEATHS} times without answering a call; the last time: {cause}")
        if was_ready:
            calls = "the calls that it was computing go to another one" if calling else "no call is lost"
            self._events.append(("reward_host_lost", f"{self._last_cause}; {calls}, and a new host takes its place"))
        member.start()


class HostLauncher:
    """See `Launcher`. Processes of one pool on all hosts."""

    def __init__(self, hosts: Hosts, pool: Pool) -> None:
        self._hosts, self._pool, self.machines = hosts, pool, hosts.machines

    def launch(self, place: int, order: Order) -> tuple[Relayed, Relayed]:
        """See `Launcher`. A process works in the folder of this one, if its machine has that."""
        there = replace(order, folder=str(Path.cwd()))
        process = self._hosts.launch(place, self._pool, there)
        return process, process

    def close(self) -> None:
        """See `Launcher`. Hosts send the rest when they are closed."""


def _answer(task: Any) -> Any:
    """The answer to a task, or the error that has ended it."""
    try:
        return ray.get(task)
    except RayError as error:
        return error
