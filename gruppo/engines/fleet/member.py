"""One engine of a fleet, as the driver sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from gruppo.actors.needs import ACTOR_CPUS
from gruppo.actors.process import Hello, cause_of_end, end_process
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.fleet.actor import EngineActor, Failure, Order
from gruppo.engines.fleet.parcels import Published
from gruppo.engines.fleet.pieces import Piece
from gruppo.utils.system import Memory

Doing = Literal["starting", "loading", "probing", "sampling"]


@dataclass
class Member:
    """An actor, and what it is doing.

    `silent`: seconds that the driver has waited for its answer. `load`: the number of the load that it has passed the
    probe with. `differences`: of its probes of the current weights. `deaths`: the versions at which its process has
    ended since it finished a piece. `sampled`: tokens of its piece.
    """

    number: int
    order: Order
    gpus: int
    doing: Doing | None = None
    silent: float = 0.0
    load: int = -1
    version: int = -1
    differences: list[float] = field(default_factory=list)
    piece: Piece | None = None
    sampled: int = 0
    hello: Hello | None = None
    memory: Memory | None = None
    deaths: list[int] = field(default_factory=list)
    starts: int = 0

    def start(self) -> None:
        """Start a new process."""
        self.starts += 1
        self.load = self.version = -1
        self.hello = self.memory = None
        self.differences = []
        actor = ray.remote(EngineActor).options(
            num_cpus=ACTOR_CPUS, num_gpus=self.gpus, max_restarts=0, max_task_retries=0
        )
        self.actor: Any = actor.remote(self.order)
        self._ask("starting", self.actor.hello.remote())

    def _ask(self, doing: Doing, task: Any) -> None:
        self.doing, self.task, self.silent = doing, task, 0.0

    def send_weights(self, published: Published, version: int) -> None:
        """Let it load weights."""
        self._ask("loading", self.actor.load.remote(published.parcels, version))

    def send_probe(self, request: Request, params: SamplingParams) -> None:
        """Let it continue the prompt of the probe."""
        self._ask("probing", self.actor.probe.remote(request, params))

    def send_piece(self, piece: Piece, params: SamplingParams, slots: int) -> None:
        """Let it sample a piece."""
        self.piece, self.sampled = piece, 0
        sample = self.actor.sample.options(num_returns="streaming")
        self._ask("sampling", sample.remote(piece.requests, params, slots))

    @property
    def ready(self) -> bool:
        """Whether its engine is there."""
        return self.hello is not None

    def answer(self) -> Any:
        """Its next answer, which must be there. Raises RayError if its process has ended."""
        self.silent = 0.0
        if self.doing == "sampling":
            return ray.get(next(self.task))
        self.doing, task = None, self.task
        return ray.get(task)

    def rest(self) -> None:
        """Note the end of its piece."""
        self.doing = self.piece = None

    def give_up(self) -> None:
        """Let it stop sampling, if it does. Its next task waits for that."""
        if self.doing == "sampling":
            ray.cancel(self.task)
            self.rest()

    def kill(self) -> None:
        """End its process, even if it is stopped. A process on this machine ends at once, others within seconds."""
        end_process(self.actor, self.hello)
        self.doing = None

    def name(self) -> str:
        """For messages."""
        return f"engine {self.number}" + (f" ({self.hello})" if self.hello else "")

    def cause(self, error: RayError | Failure) -> str:
        """Why its process has ended: in a line, with what it last wrote and held."""
        return cause_of_end(error.message if isinstance(error, Failure) else error, self.hello, self.memory)
