"""The process of one engine of a fleet: an actor of Ray. It ends with the run; all it holds can be sent again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple

import torch

from gruppo.actors.process import Hello
from gruppo.config.engine_section import Engine as EngineTable
from gruppo.engines import start_engine
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import NonFiniteError
from gruppo.engines.fleet.parcels import received
from gruppo.errors import UsageError, first_line, out_of_memory
from gruppo.models.blueprint import built
from gruppo.types import Completion
from gruppo.utils.cgroups import Memory
from gruppo.utils.system import keep_freed_memory

REPORT_SECONDS = 0.5
# What launchers tell the ranks of the trainer. An engine that inherits it would take itself for one of them.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

FailureKind = Literal["usage", "value", "nonfinite", "memory", "engine"]


class Failure(NamedTuple):
    """An error of an engine, as text: exceptions of other processes do not always survive pickling.

    "usage", "value", "nonfinite" and "memory" become the exception that the engine raised. "engine" is anything else,
    and ends the process.
    """

    kind: FailureKind
    message: str


class Report(NamedTuple):
    """What an engine has sampled since its last report: a number of tokens, and whole requests by their places.

    `last`: the piece has ended, with a `failure` if there is one.
    """

    tokens: int
    groups: list[tuple[int, list[Completion]]]
    memory: Memory
    last: bool
    failure: Failure | None


class Loaded(NamedTuple):
    """Weights are loaded."""

    memory: Memory


@dataclass(frozen=True)
class Order:
    """The engine that an actor is to hold. `blueprint`: see `sampling_blueprint`. `device`: where its weights are to
    arrive. `devices`: over how many devices vLLM splits the model."""

    blueprint: bytes
    settings: EngineTable
    slots: int
    length: int
    device: str
    devices: int
    threads: int


class EngineActor:
    """Methods that the driver calls, one at a time. Each answers with a `Failure` where an engine would raise."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.engine: Engine | None = None
        self.work: _Work | None = None

    def hello(self) -> Hello | Failure:
        """Build the engine."""
        for name in _OF_RANKS:
            os.environ.pop(name, None)
        order = self.order
        torch.set_num_threads(order.threads)
        keep_freed_memory()
        try:
            policy = built(order.blueprint)
            self.engine = start_engine(policy, order.slots, order.length, order.settings, order.devices)
        except Exception as error:  # noqa: BLE001  the driver reports it
            return _failure(error)
        return Hello.of_this_process()

    def load(self, parcels: Sequence[Any], version: int) -> Loaded | Failure:
        """See `Engine.load_weights`."""
        engine = self._idle_engine()
        try:
            engine.load_weights(received(parcels, torch.device(self.order.device)), version)
        except Exception as error:  # noqa: BLE001
            return _failure(error)
        return Loaded(Memory.now())

    def probe(self, request: Request, params: SamplingParams) -> Completion | Failure:
        """The completion of a request with one stream."""
        engine = self._idle_engine()
        try:
            ((completion,),) = engine.generate([request], params)
        except Exception as error:  # noqa: BLE001
            return _failure(error)
        return completion

    def sample(self, requests: Sequence[Request], params: SamplingParams, slots: int) -> Iterator[Report]:
        """Sample a piece. Reports come while it is sampled, but none as long as nothing is."""
        engine = self._idle_engine()
        engine.slots = slots
        self.work = _Work(lambda advance: engine.stream(requests, params, advance))
        yield from self.work.reports()

    def _idle_engine(self) -> Engine:
        """The engine, after the end of a piece that the driver has given up."""
        if self.work is not None:
            self.work.abandon()
            self.work = None
        assert self.engine is not None
        return self.engine


def _failure(error: Exception) -> Failure:
    kinds: dict[type[Exception], FailureKind] = {UsageError: "usage", NonFiniteError: "nonfinite", ValueError: "value"}
    kind: FailureKind = next((name for known, name in kinds.items() if isinstance(error, known)), "engine")
    return Failure("memory" if out_of_memory(error) else kind, first_line(error))


class _AbandonedError(Exception):
    """Ends a piece that the driver has given up."""


@dataclass
class _Work:
    """A piece that is sampled in a thread of its own, so that reports do not wait for whole groups."""

    stream: Callable[[Callable[[float], None]], Iterator[tuple[int, list[Completion]]]]
    news: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    given_up: bool = False

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for group in self.stream(self._advance):
                self.news.put(group)
            self.news.put(None)
        except _AbandonedError:
            self.news.put(None)
        except Exception as error:  # noqa: BLE001
            self.news.put(_failure(error))

    def _advance(self, tokens: float) -> None:
        if self.given_up:
            raise _AbandonedError
        self.news.put(int(tokens))

    def abandon(self) -> None:
        """Stop sampling. Returns when the engine is free."""
        self.given_up = True
        self.thread.join()

    def reports(self) -> Iterator[Report]:
        """Everything that is sampled, at most twice a second; the last report ends the piece."""
        ended = False
        try:
            while not ended:
                item, tokens, groups, failure = self.news.get(), 0, [], None
                due = time.monotonic() + REPORT_SECONDS
                while True:
                    if isinstance(item, int):
                        tokens += item
                    elif isinstance(item, Failure):
                        failure = item
                    elif item is not None:
                        groups.append(item)
                    ended = item is None or failure is not None
                    if ended:
                        break
                    try:
                        item = self.news.get(timeout=max(0.0, due - time.monotonic()))
                    except Empty:
                        break
                yield Report(tokens, groups, Memory.now(), ended, failure)
        finally:
            self.abandon()
