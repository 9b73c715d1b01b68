"""A fleet: several engines as actors of Ray, behind the interface of one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
import torch
from ray.exceptions import RayError

from gruppo.actors.needs import START_SECONDS
from gruppo.actors.process import Hello, require_same_versions
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.completions import NonFiniteError, check_requests
from gruppo.engines.fleet.actor import Failure, Loaded, Order, Report
from gruppo.engines.fleet.member import Member
from gruppo.engines.fleet.parcels import Published, Way
from gruppo.engines.fleet.pieces import Piece, pieces_of
from gruppo.engines.probe import ATTEMPTS, drift, largest_drift, probe_params, probe_request, wrong_weights
from gruppo.errors import RunError, UsageError
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.types import Completion
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Advance
from gruppo.utils.waiting import waiting_for

TURN_SECONDS = 0.5
MOST_DEATHS, DEATH_VERSIONS = 3, 10

Notify = Callable[[str, str], None]  # kind of an event, and its message


@dataclass
class _Call:
    """A call of `stream` under way. `left`: pieces that no engine has. `found`: what the caller has not taken yet."""

    params: SamplingParams
    left: deque[Piece]
    pieces: int
    found: deque[tuple[int, list[Completion]]]
    tokens: int = 0


@dataclass
class _Spent:
    """Since the last step: engine-seconds of sampling, and how many of them an engine had nothing to do."""

    seconds: float = 0.0
    idle: float = 0.0


class Fleet(Engine):
    """See `Engine`. `slots` are those of each engine.

    Requests are cut into pieces (see `pieces`), which go to whoever is free. An engine whose process ends loses the
    piece that it was sampling; another engine samples it again. A new process takes the place of the one that ended,
    and samples once it has the weights and has passed the probe. An engine that is silent for longer than `patience`
    seconds is killed first.

    In float32 and float64 completions have the tokens of a single engine. Log-probabilities are equal to the last bit
    as long as the number of engines and their slots are equal, whichever engine samples what, and however many die.
    From one process they differ by rounding, because a piece is computed in smaller batches than the whole.
    """

    def __init__(
        self,
        policy: LanguageModel,
        orders: Sequence[Order],
        gpus: int,
        way: Way,
        dtypes: Mapping[str, torch.dtype],
        patience: float,
        room: str,
    ) -> None:
        """One engine for each of the orders; see `start`. They have no weights before the first `load_weights`.

        `policy`: scores the probe: the policy that is trained, or a copy of it (of the leader of several ranks, or
        of a run that samples ahead). `gpus`: of each engine. `dtypes`: those in which weights travel, by name.
        `room`: what Ray has and needs, for the message if an engine finds no place.
        """
        self.policy, self.way, self.dtypes, self.patience, self.room = policy, way, dtypes, patience, room
        self.slots, self.version = orders[0].slots, -1
        self.untold: list[tuple[str, str]] = []  # what happened before anyone was to be notified
        self.notify: Notify = lambda kind, message: self.untold.append((kind, message))
        self._probe = probe_request(policy), probe_params(policy)
        self._published: Published | None = None
        self._loads, self._load_seconds = 0, 0.0
        self._call: _Call | None = None
        self._spent, self._without = _Spent(), 0.0
        self._last_cause = ""
        self.members = [Member(number, order, gpus) for number, order in enumerate(orders)]

    def start(self) -> None:
        """Start all engines, and wait for each until it is there or is lost. Raises RunError or UsageError if none
        starts, or one cannot."""
        for member in self.members:
            member.start()
        self._wait_for(
            lambda: any(one.ready for one in self.members) and all(one.ready or one.starts > 1 for one in self.members)
        )

    # Weights.

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. Engines that are starting get the weights later.

        The published weights are kept until the next ones replace them, for engines that start in between. Raises
        RunError if an engine fails the probe twice.
        """
        started = time.monotonic()
        if source.module is not self.policy.model:  # a copy, of the leader or of a run that samples ahead
            self.policy.take_weights(source)
        self._published = self.way.publish(self.policy.weight_source(), self.dtypes)
        self.version, self._loads = version, self._loads + 1
        for member in self.members:
            member.differences = []
        self._wait_for(lambda: all(member.load == self._loads for member in self.members if member.ready))
        self._load_seconds = time.monotonic() - started

    # Sampling.

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, advance: Advance | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine`.

        Raises RunError if one engine has ended three times in ten versions of the weights without a finished piece
        between, and if no engine is left for `patience` seconds.
        """
        check_requests(requests)
        yield from ((place, []) for place, request in enumerate(requests) if not request.streams)
        pieces = pieces_of(requests, self.slots, len(self.members))
        call = self._call = _Call(params, deque(pieces), len(pieces), deque())
        try:
            while call.pieces or call.found:
                self._wait_for(lambda: call.found or call.tokens or not call.pieces)
                if advance is not None and call.tokens:
                    advance(call.tokens)
                call.tokens = 0
                while call.found:
                    yield call.found.popleft()
        finally:
            self._call = None
            for member in self.members:
                member.give_up()

    # One turn: give work, wait for an answer, look for engines that are silent.

    def _wait_for(self, condition: Callable[[], object]) -> None:
        with waiting_for(lambda: _awaited(self.members)) as wait:
            while not condition():
                if self._turn():
                    wait.moved()

    def _turn(self) -> bool:
        """Returns whether an engine has answered."""
        for member in self.members:
            if member.doing is None:
                self._employ(member)
        asked = [member for member in self.members if member.doing is not None]
        began = time.monotonic()
        answered, _ = ray.wait([member.task for member in asked], num_returns=1, timeout=TURN_SECONDS)
        self._count(time.monotonic() - began)
        if not answered:
            answered, _ = ray.wait([member.task for member in asked], num_returns=len(asked), timeout=0)
        for member in asked:
            if any(member.task == task for task in answered):
                self._hear(member)
            elif member.silent > (self.patience if member.ready else max(self.patience, START_SECONDS)):
                starting = member.doing == "starting"
                words = f"silent for {member.silent:.0f} s while {member.doing} (cluster.patience), so it was killed"
                self._lose(member, f"{words}; {self.room}" if starting else words, starting)
        return bool(answered)

    def _employ(self, member: Member) -> None:
        if self._published is not None and member.load != self._loads:
            member.send_weights(self._published, self.version)
        elif self._call is not None and self._call.left:
            member.send_piece(self._call.left.popleft(), self._call.params, self.slots)

    def _count(self, seconds: float) -> None:
        for member in self.members:
            member.silent += seconds
        if self._call is not None:
            working = sum(member.doing == "sampling" for member in self.members)
            self._spent.seconds += seconds * len(self.members)
            self._spent.idle += seconds * (len(self.members) - working)
        self._without = 0.0 if any(member.ready for member in self.members) else self._without + seconds
        if self._without > max(self.patience, START_SECONDS):
            raise RunError(
                f"cluster.engines = {len(self.members)}: no engine has been there for {self._without:.0f} s "
                f"({self._last_cause or self.room}); resume with --resume when there is room for them"
            )

    def _hear(self, member: Member) -> None:
        doing = member.doing
        try:
            answer = member.answer()
        except RayError as error:
            self._lose(member, member.cause(error))
            return
        if isinstance(answer, Report):
            self._take(member, answer)
        elif doing == "probing":
            self._compare(member, answer)
        elif isinstance(answer, Failure):
            self._fail(member, answer)
        elif isinstance(answer, Hello):
            self._greet(member, answer)
        elif isinstance(answer, Loaded):
            member.memory = answer.memory
            member.send_probe(*self._probe)

    def _greet(self, member: Member, hello: Hello) -> None:
        require_same_versions(hello, "cluster.engines")
        member.hello = hello
        if member.starts > 1:
            self.notify("engine_back", f"{member.name()} is back, as process {member.starts} of this run")

    def _compare(self, member: Member, answer: Completion | Failure) -> None:
        """Let the engine sample if it has passed the probe; else let it load once more."""
        if isinstance(answer, Failure) and answer.kind != "nonfinite":
            self._fail(member, answer)
            return
        difference = float("inf") if isinstance(answer, Failure) else drift(self.policy, answer)
        member.differences.append(difference)
        if difference <= largest_drift(self.policy.dtype):
            member.load, member.version = self._loads, self.version
        elif len(member.differences) == ATTEMPTS:
            name = f'"{member.order.settings.name}", number {member.number}'
            raise wrong_weights(name, self.version, member.differences, self.policy.dtype)

    def _take(self, member: Member, report: Report) -> None:
        piece, call = member.piece, self._call
        member.memory = report.memory
        assert piece is not None
        assert call is not None
        member.sampled += report.tokens
        call.tokens += max(0, member.sampled - piece.told)
        piece.told = max(piece.told, member.sampled)
        for place, completions in report.groups:
            if place not in piece.given:
                piece.given.add(place)
                call.found.append((piece.places[place], completions))
        if report.failure is not None:
            self._fail(member, report.failure)
        elif report.last:
            member.rest()
            member.deaths.clear()
            call.pieces -= 1

    def _fail(self, member: Member, failure: Failure) -> None:
        """Raise what the engine raised, or replace its process."""
        if error := _raised(failure, sampling=member.piece is not None):
            raise error
        self._lose(member, member.cause(failure))

    def _lose(self, member: Member, cause: str, starting: bool = False) -> None:
        """Replace the process of an engine. Raises RunError if that has happened too often. `starting`: it has found no
        place yet, or is slow to start, which may happen as often as it will while others work."""
        self._last_cause = f"{member.name()}: {cause}"
        piece, member.piece = member.piece, None
        if piece is not None and self._call is not None:
            self._call.left.appendleft(piece)
        member.kill()
        member.deaths = [version for version in member.deaths if version > self.version - DEATH_VERSIONS]
        member.deaths += [] if starting else [self.version]
        if len(member.deaths) >= MOST_DEATHS:
            raise RunError(
                f"engine {member.number} has ended {MOST_DEATHS} times without finishing any work; the last time: "
                f"{cause}"
            )
        work = "the piece that it was sampling goes to another engine" if piece is not None else "no work is lost"
        self.notify("engine_lost", f"{self._last_cause}; {work}, and a new process takes its place")
        member.start()

    # What a run reports, and the end.

    def observe(self, metrics: Metrics) -> None:
        """Add what the engines have done since the last call to the metrics of a step."""
        metrics.mean("engine/idle_share", self._spent.idle, self._spent.seconds)
        metrics.mean("engine/load_seconds", self._load_seconds)
        metrics.mean("engine/load_bytes", self._published.size if self._published is not None else 0)
        for member in self.members:
            metrics.mean(f"engine/{member.number}/version", member.version)
        self._spent = _Spent()

    def sleep(self) -> None:
        """See `Engine`. Its engines have devices of their own, so nothing is to be freed."""

    def close(self) -> None:
        """See `Engine`."""
        for member in self.members:
            if member.starts:
                member.kill()
        self._published = None


def _awaited(members: Sequence[Member]) -> str:
    """The engine that has been silent for longest, in words."""
    member = max(members, key=lambda one: one.silent if one.doing is not None else -1.0)
    return f"{member.name()}, which is {member.doing or 'idle'}"


def _raised(failure: Failure, sampling: bool) -> Exception | None:
    """The exception of an engine that its caller has to know of; None if a new process may do better."""
    if failure.kind == "usage":
        return UsageError(failure.message)
    if failure.kind == "value":
        return ValueError(failure.message)
    if failure.kind == "nonfinite":
        return NonFiniteError()
    return MemoryError(failure.message) if failure.kind == "memory" and sampling else None
