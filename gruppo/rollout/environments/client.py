"""The environments of a run, as the trainer holds them: Python in sandboxes, or a user's class in processes of its own,
where it can hang or crash without touching the trainer."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from gruppo.config.sections import Environment as Settings
from gruppo.config.units import as_bytes
from gruppo.errors import RunError
from gruppo.rollout.environments.python_tool import Pool, PythonBlocks
from gruppo.rollout.sandbox import Limits, PythonPool
from gruppo.rollout.workers.log import Output
from gruppo.rollout.workers.process import LOAD_TIMEOUT, TICK_SECONDS, Worker, wait
from gruppo.rollout.workers.rewards import pickled
from gruppo.utils.progress import Progress

NAME = "environment"  # of its part of the reward
MOST_SANDBOXES = 64  # each holds an interpreter and what its blocks have made, until its completion is over
Tick = Callable[[], None]


@dataclass
class EnvironmentHandle:
    """A completion and its environment: what the model wrote in each turn so far."""

    number: int
    row: Mapping[str, Any]
    seed: int
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """An answer, a message each; None: it has nothing to say. `failure`: why there is none, in words. `reward` is there
    at the end only."""

    observations: tuple[str, ...] | None = None
    done: bool = False
    calls: int = 0
    errors: int = 0
    reward: float | None = None
    failure: str | None = None


class Environments(Protocol):
    """What all completions of a step talk to. `most`: how many may be open at a time."""

    most: int
    stop: tuple[str, ...]
    schemas: list[dict[str, Any]]
    gives_reward: bool
    digests: list[str]

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """Answers to the last text of each, or the first observation where there is none yet. `tick` is called at least
        every half second and may raise."""

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """The rewards of completions that are over; each is let go of."""

    def drop(self) -> None:
        """Let go of whatever is held."""

    def close(self) -> None:
        """End all processes."""


class PythonEnvironments:
    """Blocks of Python, each completion's in a sandbox of its own."""

    stop = PythonBlocks.stop
    gives_reward = False
    most = MOST_SANDBOXES

    def __init__(self, pool: Pool, workers: int) -> None:
        self.schemas: list[dict[str, Any]] = []
        self.digests: list[str] = []
        self.pool, self.threads = pool, ThreadPoolExecutor(workers, "sandbox")
        self.held: dict[int, PythonBlocks] = {}

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`."""
        waiting = [self.threads.submit(self._step, play) for play in plays]
        try:
            while not all(each.done() for each in waiting):
                wait_for(waiting, TICK_SECONDS)
                tick()
        except BaseException:
            for each in waiting:
                each.cancel()
            raise
        return [each.result() for each in waiting]

    def _step(self, play: EnvironmentHandle) -> Answer:
        if not play.texts:
            return Answer()
        held = self.held.setdefault(play.number, PythonBlocks(self.pool))
        turn = held.step(play.texts[-1])
        shown = None if turn.observation is None else (str(turn.observation),)
        return Answer(shown, turn.done, turn.calls, turn.errors)

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`. Python gives no reward."""
        for play in plays:
            if held := self.held.pop(play.number, None):
                held.close()
        return [Answer() for _ in plays]

    def drop(self) -> None:
        """See `Environments`."""
        while self.held:
            self.held.popitem()[1].close()

    def close(self) -> None:
        """See `Environments`."""
        self.threads.shutdown(wait=True, cancel_futures=True)
        self.drop()
        self.pool.close()


class _Host(Worker):
    module = "gruppo.rollout.environments.worker_main"
    field, limit, log = "environment.name", "environment.seconds", "environment.log"
    variables = MappingProxyType({"PYTHONHASHSEED": "0"})  # the order of sets is the same in every process


class ProcessEnvironments:
    """Objects of a user's class in processes of their own. A call that takes too long, or kills its process, fails
    alone: the other objects of that process are made again, by what they were given so far."""

    most = sys.maxsize

    def __init__(self, settings: Settings, passed: Sequence[str], log: Path | None, progress: Progress) -> None:
        """`passed`: names of variables of the environment that the processes get; `log`: a file for what the class
        prints. Raises UsageError."""
        self.seconds, self.shown = settings.seconds, settings.output
        self._memory, self._passed = as_bytes(settings.memory), list(passed)
        self._load = pickled(
            {"kind": "load", "name": settings.name, "options": dict(settings.options), "path": sys.path}
        )
        self._output = Output(log) if log is not None else None
        self._workers: list[_Host] = []
        self._places: dict[int, _Host] = {}  # by number of the completion: the process that knows all of it
        try:
            self._workers = [self._new_worker() for _ in range(settings.workers)]
            with progress.bar("Loading the environment", settings.workers, "processes") as show:
                digests = [worker.load(show) for worker in self._workers]
        except BaseException:
            self.close()
            raise
        told = self._workers[0].told
        self.digests = digests[0]
        self.schemas: list[dict[str, Any]] = told["schemas"]
        self.stop = tuple(told["stop"])
        self.gives_reward = bool(told["gives_reward"])

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`."""
        return self._ask("turn", plays, tick)

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`."""
        made = self._ask("end", plays, tick)
        for play in plays:
            self._places.pop(play.number, None)
        return made

    def drop(self) -> None:
        """See `Environments`. What a process still holds is never asked for again; its memory goes with it."""
        stale = {worker for number, worker in self._places.items()}
        self._places = {}
        for worker in stale:
            worker.kill()
            self._replace(worker)

    def close(self) -> None:
        """See `Environments`."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        if self._output is not None:
            self._output.close()
            self._output = None

    def _ask(self, kind: str, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """One call a completion; a completion's calls go to one process, and processes work side by side."""
        queues: list[deque[int]] = [deque() for _ in self._workers]
        for number, play in enumerate(plays):
            queues[play.number % len(queues)].append(number)
        answers: dict[int, Answer] = {}
        busy: dict[int, tuple[int | None, float]] = {}
        try:
            while len(answers) < len(plays):
                for place in range(len(queues)):
                    if place not in busy and queues[place]:
                        busy[place] = self._give(place, queues[place], kind, plays)
                soonest = min(deadline for _, deadline in busy.values()) - time.monotonic()
                wait([self._workers[place] for place in busy], min(max(0.0, soonest), TICK_SECONDS))
                for place, (index, deadline) in list(busy.items()):
                    answer = self._collect(place, index, deadline)
                    if answer is not None:
                        del busy[place]
                        if index is not None:
                            answers[index] = answer
                            if answer.failure:
                                self._places.pop(plays[index].number, None)
                tick()
        except BaseException:
            for place in busy:
                self._workers[place].kill()
                self._replace(self._workers[place])
            raise
        return [answers[number] for number in range(len(plays))]

    def _give(
        self, place: int, queue: deque[int], kind: str, plays: Sequence[EnvironmentHandle]
    ) -> tuple[int | None, float]:
        """Begin the next call of a process, or wait for one that is still loading; the call and its deadline."""
        worker = self._workers[place]
        if worker.process.poll() is not None:
            worker.kill()
            worker = self._replace(worker)
        if not worker.loaded:
            return None, time.monotonic() + LOAD_TIMEOUT
        index = queue.popleft()
        play = plays[index]
        again = self._places.get(play.number) is not worker
        self._places[play.number] = worker
        message = {"kind": kind, "play": play.number, "row": play.row, "seed": play.seed, "texts": play.texts}
        worker.send(pickled(message))
        return index, time.monotonic() + self.seconds * (1 + again * len(play.texts))

    def _collect(self, place: int, index: int | None, deadline: float) -> Answer | None:
        worker = self._workers[place]
        content = worker.answer_by(deadline)
        if content is None:
            return None
        if worker.dead:
            self._replace(worker)
        if index is not None:
            return self._read(content)
        if content.get("digests") != self.digests:
            why = content.get("error") or content.get("failure") or "its code has changed since the run began"
            raise RunError(
                f"a process of the environment was replaced and cannot load it again ({why}); mend it, and resume"
            )
        worker.loaded = True
        return Answer()

    def _read(self, content: Mapping[str, Any]) -> Answer:
        """An answer as it came out of a process in which a user's code can have changed anything."""
        if "failure" in content:
            return Answer(failure=str(content["failure"]))
        try:
            texts, reward = content.get("observations"), content.get("reward")
            if reward is not None and type(reward) not in (int, float):
                raise ValueError("no number")
            shown = None if texts is None else tuple(self._cut(str(text)) for text in texts)
            counts = int(content.get("calls", 0)), int(content.get("errors", 0))
            return Answer(shown, bool(content.get("done", False)), *counts, reward)
        except (TypeError, ValueError):
            return Answer(failure="its process gave an answer of no use")

    def _cut(self, text: str) -> str:
        over = len(text) - self.shown
        return text if over <= 0 else f"{text[: self.shown]}… ({over} more characters)"

    def _new_worker(self) -> _Host:
        return _Host(self._load, self._output, self._memory, self._passed)

    def _replace(self, worker: _Host) -> _Host:
        self._workers[self._workers.index(worker)] = made = self._new_worker()
        return made


class _Closed:
    """In the place of a pool where no block is run."""

    def session(self) -> Any:
        raise AssertionError("nothing is sampled")

    def close(self) -> None:
        """Nothing to end."""


def open_environments(
    settings: Settings, passed: Sequence[str], log: Path | None, progress: Progress, played: bool = True
) -> Environments:
    """The environments of a recipe. `passed`, `log`: see `ProcessEnvironments`; `played`: False where no block will be run, so that
    no sandbox is needed. Raises UsageError where they cannot run here."""
    if settings.name != "python":
        return ProcessEnvironments(settings, passed, log, progress)
    return PythonEnvironments(_python_pool(settings) if played else _Closed(), settings.workers)


def _python_pool(settings: Settings) -> Pool:
    return PythonPool(
        Limits(
            seconds=settings.seconds,
            processor_seconds=settings.seconds,
            memory=as_bytes(settings.memory),
            output=settings.output,
        ),
        ready=settings.workers,
        run_model_code_WITHOUT_A_SANDBOX=settings.run_model_code_WITHOUT_A_SANDBOX,
    )
