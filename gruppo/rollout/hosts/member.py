"""One reward host, as the run sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from gruppo.actors.needs import ACTOR_CPUS
from gruppo.actors.process import cause_of_end, end_process
from gruppo.rollout.hosts.actor import Host, HostActor, News
from gruppo.rollout.hosts.relayed import Relayed
from gruppo.rollout.workers.log import LogFile
from gruppo.rollout.workers.process import Order
from gruppo.utils.cgroups import Memory

# Ray would kill the supervisors of an actor that ends, and they could not end what their processes have started.
_VARIABLES = {"RAY_kill_child_processes_on_worker_exit": "0"}
MOST_BLOCKS = 64  # sandboxes of a host that compute at the same time


@dataclass(frozen=True)
class Pool:
    """Processes with the same code. `log`: keeps what they print; `memory`: the limit of one of them on a machine with
    this memory, in bytes; None for what is ordered."""

    number: int
    log: LogFile | None
    memory: Callable[[int], int] | None


@dataclass
class Member:
    """An actor, and its processes by number.

    `silent`: seconds for which it has said nothing. `deaths`: how often it has ended since it last answered a call.
    `waiting`: what it is to do once it is there. `closed`: it has ended its processes. `blocks`: how many run in its
    sandboxes.
    """

    number: int
    beat: float
    silent: float = 0.0
    deaths: int = 0
    starts: int = 0
    host: Host | None = None
    memory: Memory | None = None
    processes: dict[int, Relayed] = field(default_factory=dict)
    waiting: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    closed: bool = False
    blocks: int = 0

    def start(self) -> None:
        """Start a new actor, on another machine than the other ones if possible."""
        self.silent, self.host, self.memory = 0.0, None, None
        kind = ray.remote(concurrency_groups={"news": 1, "blocks": MOST_BLOCKS})(HostActor)
        actor = kind.options(
            num_cpus=ACTOR_CPUS,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": _VARIABLES},
        )
        self.actor: Any = actor.remote(self.beat)
        self.task: Any = self.actor.hello.remote()
        self.starts += 1

    @property
    def ready(self) -> bool:
        """Whether it is there."""
        return self.host is not None

    def greet(self, host: Host) -> None:
        """It is there: let it do what waits for it."""
        self.host, self.silent = host, 0.0
        self.ask_for_news()
        for process in self.processes.values():
            process.begin()
        for method, arguments in self.waiting:
            self.tell(method, *arguments)
        self.waiting = []

    def ask_for_news(self) -> None:
        """Ask for its next news."""
        self.task = self.actor.news.options(concurrency_group="news").remote()

    def take(self, news: News) -> None:
        """Note that it lives."""
        self.silent, self.memory, self.closed = 0.0, news.memory, news.last
        if not news.last:
            self.ask_for_news()

    def hear(self) -> None:
        """All news up to now have been taken."""
        now = time.monotonic()
        for process in self.processes.values():
            process.heard_until(now)

    def add(self, process: Relayed, pool: Pool, order: Order) -> None:
        """Start a process."""
        self.processes[process.number] = process
        if self.ready:
            process.begin()
        self.tell("launch", process.number, pool, order)

    def tell(self, method: str, number: int, *arguments: Any) -> None:
        """Let it do something with a process, once it is there."""
        if self.host is None:
            self.waiting.append((method, (number, *arguments)))
            return
        if method == "launch":
            pool, order = arguments
            memory = order.memory if pool.memory is None else pool.memory(self.host.memory)
            arguments = pool.number, replace(order, memory=memory)
        elif method == "end":
            self.processes.pop(number, None)
        getattr(self.actor, method).remote(number, *arguments)

    def lose(self, cause: str) -> bool:
        """Its process has ended, or is ended now, and its processes are lost. Returns whether one had an open call."""
        end_process(self.actor, self.host and self.host.hello)
        calling = self.blocks > 0 or any(process.calling for process in self.processes.values())
        for process in self.processes.values():
            process.lose(cause)
        self.processes, self.waiting, self.blocks = {}, [], 0
        self.deaths += not calling
        return calling

    def name(self) -> str:
        """For messages."""
        where = f" (process {self.host.hello.pid} on {self.host.hello.host})" if self.host else ""
        return f"reward host {self.number}{where}"

    def cause(self, why: RayError | str) -> str:
        """Why it has ended, or is to be ended: in a line, with what it last wrote and held."""
        return cause_of_end(why, self.host and self.host.hello, self.memory)
