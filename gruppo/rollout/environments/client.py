"""The trainer's side of environments: Python blocks in sandboxes, or a user-defined class in worker processes, where it
can hang or crash without affecting the trainer."""

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
from gruppo.rollout.environments.python_tool import Pool, PythonBlocks
from gruppo.rollout.sandbox import Limits, PythonPool
from gruppo.rollout.workers.log import Output
from gruppo.rollout.workers.process import TICK_SECONDS, Worker, wait
from gruppo.rollout.workers.rewards import pickled
from gruppo.rollout.workers.worker_set import WorkerSet
from gruppo.utils.progress import Progress
from gruppo.utils.waiting import moved, waiting_for

NAME = "environment"  # of its part in the reward
MOST_SANDBOXES = 64  # each keeps an interpreter with the objects of its blocks until its completion is finished
Tick = Callable[[], None]


@dataclass
class EnvironmentHandle:
    """The environment of one completion. `texts`: what the model wrote in each turn so far."""

    number: int
    row: Mapping[str, Any]
    seed: int
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """Answer of an environment. `observations`: one per message, None if it has none. `reward`: set at the end only.
    `failure`: why the environment could not answer."""

    observations: tuple[str, ...] | None = None
    done: bool = False
    calls: int = 0
    errors: int = 0
    reward: float | None = None
    failure: str | None = None


class Environments(Protocol):
    """The environments of a step's completions. `most`: how many may be open at the same time."""

    most: int
    stop: tuple[str, ...]
    schemas: list[dict[str, Any]]
    gives_reward: bool
    digests: list[str]

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """Answer the last text of each completion, or reset its environment if there is none yet. `tick` is called at
        least every half second and may raise."""

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """Get the rewards of finished completions and release their environments."""

    def drop(self) -> None:
        """Release all environments that are still open."""

    def close(self) -> None:
        """End all processes."""

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Have `notify` called with a description whenever a process fails to load and is restarted."""


class PythonEnvironments:
    """Runs Python blocks, with one sandbox per completion."""

    stop = PythonBlocks.stop
    gives_reward = False
    most = MOST_SANDBOXES

    def __init__(self, pool: Pool, workers: int) -> None:
        self.schemas: list[dict[str, Any]] = []
        self.digests: list[str] = []
        self.pool, self.threads = pool, ThreadPoolExecutor(workers, "sandbox")
        self.open: dict[int, PythonBlocks] = {}  # by number of the completion

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`."""
        futures = [self.threads.submit(self._step, play) for play in plays]
        try:
            with waiting_for("Python blocks in the sandbox") as waited:
                for future in futures:
                    future.add_done_callback(lambda _: waited.moved())
                while not all(future.done() for future in futures):
                    wait_for(futures, TICK_SECONDS)
                    tick()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]

    def _step(self, play: EnvironmentHandle) -> Answer:
        if not play.texts:
            return Answer()
        blocks = self.open.setdefault(play.number, PythonBlocks(self.pool))
        turn = blocks.step(play.texts[-1])
        observations = None if turn.observation is None else (str(turn.observation),)
        return Answer(observations, turn.done, turn.calls, turn.errors)

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`. Python blocks give no reward."""
        for play in plays:
            if blocks := self.open.pop(play.number, None):
                blocks.close()
        return [Answer() for _ in plays]

    def drop(self) -> None:
        """See `Environments`."""
        while self.open:
            self.open.popitem()[1].close()

    def close(self) -> None:
        """See `Environments`."""
        self.threads.shutdown(wait=True, cancel_futures=True)
        self.drop()
        self.pool.close()

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """See `Environments`. A sandbox loads nothing of the user's."""


class _Host(Worker):
    module = "gruppo.rollout.environments.worker_main"
    field, limit, log = "environment.name", "environment.seconds", "environment.log"
    doing = "loading the class"
    advice = "do less when its module is imported"
    variables = MappingProxyType({"PYTHONHASHSEED": "0"})  # so that sets have the same order in every process


class ProcessEnvironments:
    """Objects of a user-defined class in worker processes.

    A call that takes too long or kills its process fails alone: the other objects of that process are rebuilt by
    replaying the texts that they got so far.
    """

    most = sys.maxsize

    def __init__(self, settings: Settings, passed: Sequence[str], log: Path | None, progress: Progress) -> None:
        """`passed`: names of environment variables that the processes get; `log`: file for the class's output. Raises
        UsageError if the class cannot be loaded."""
        self.name, self.seconds, self.max_characters = settings.name, settings.seconds, settings.output
        load = {"kind": "load", "name": settings.name, "options": dict(settings.options), "path": sys.path}
        message, memory = pickled(load), as_bytes(settings.memory)
        self._output = Output(log) if log is not None else None
        self._places: dict[int, _Host] = {}  # by number of the completion: the process that has its object

        def start(delay: float) -> _Host:
            return _Host(message, self._output, memory, passed, delay)

        try:
            self._workers = WorkerSet(start, settings.workers, "Loading the environment", progress)
        except BaseException:
            self._close_output()
            raise
        loaded = self._workers.members[0].load_answer
        self.digests = self._workers.digests
        self.schemas: list[dict[str, Any]] = loaded["schemas"]
        self.stop = tuple(loaded["stop"])
        self.gives_reward = bool(loaded["gives_reward"])

    def answer(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`."""
        with waiting_for(f"environment {self.name}"):
            return self._ask("turn", plays, tick)

    def end(self, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """See `Environments`."""
        with waiting_for(f"environment {self.name}, which gives rewards"):
            answers = self._ask("end", plays, tick)
        for play in plays:
            self._places.pop(play.number, None)
        return answers

    def drop(self) -> None:
        """See `Environments`. Processes with open objects are replaced, which frees the memory of the objects."""
        stale = set(self._places.values())
        self._places = {}
        for worker in stale & set(self._workers):
            self._workers.replace(worker)

    def close(self) -> None:
        """See `Environments`."""
        self._workers.close()
        self._close_output()

    def _close_output(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """See `Environments`."""
        self._workers.notify = notify

    def _ask(self, kind: str, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """Make one call per completion. A completion always uses the same process; processes work in parallel."""
        queues: list[deque[int]] = [deque() for _ in self._workers.members]
        for number, play in enumerate(plays):
            queues[play.number % len(queues)].append(number)
        answers: dict[int, Answer] = {}
        busy: dict[int, tuple[int | None, float]] = {}
        try:
            while len(answers) < len(plays):
                for place in range(len(queues)):
                    if place not in busy and queues[place]:
                        busy[place] = self._start_call(place, queues[place], kind, plays)
                soonest = min(deadline for _, deadline in busy.values()) - time.monotonic()
                wait([self._workers.members[place] for place in busy], min(max(0.0, soonest), TICK_SECONDS))
                for place, (index, deadline) in list(busy.items()):
                    answer = self._collect(place, index, deadline)
                    if answer is not None:
                        del busy[place]
                        moved()
                        if index is not None:
                            answers[index] = answer
                            if answer.failure:
                                self._places.pop(plays[index].number, None)
                tick()
        except BaseException:
            for place in busy:
                self._workers.replace(self._workers.members[place])
            raise
        return [answers[number] for number in range(len(plays))]

    def _start_call(
        self, place: int, queue: deque[int], kind: str, plays: Sequence[EnvironmentHandle]
    ) -> tuple[int | None, float]:
        """Start the next call of a process. Returns the index of the call (None while the process is loading) and the
        deadline."""
        worker = self._workers.alive(self._workers.members[place])
        if not worker.loaded:
            return None, worker.load_by
        index = queue.popleft()
        play = plays[index]
        rebuild = self._places.get(play.number) is not worker
        self._places[play.number] = worker
        message = {"kind": kind, "play": play.number, "row": play.row, "seed": play.seed, "texts": play.texts}
        worker.send(pickled(message))
        return index, time.monotonic() + self.seconds * (1 + rebuild * len(play.texts))

    def _collect(self, place: int, index: int | None, deadline: float) -> Answer | None:
        worker = self._workers.members[place]
        content = worker.answer_by(deadline)
        if content is None:
            return None
        if index is None:
            self._workers.loaded(worker, content)
            return Answer()
        if worker.dead:
            self._workers.replace(worker)
        return self._read(content)

    def _read(self, content: Mapping[str, Any]) -> Answer:
        """Validate an answer: in the process that sent it, user code can have changed anything."""
        if "failure" in content:
            return Answer(failure=str(content["failure"]))
        try:
            texts, reward = content.get("observations"), content.get("reward")
            if reward is not None and type(reward) not in (int, float):
                raise ValueError("not a number")
            observations = None if texts is None else tuple(self._cut(str(text)) for text in texts)
            counts = int(content.get("calls", 0)), int(content.get("errors", 0))
            return Answer(observations, bool(content.get("done", False)), *counts, reward)
        except (TypeError, ValueError):
            return Answer(failure="its process returned an invalid answer")

    def _cut(self, text: str) -> str:
        over = len(text) - self.max_characters
        return text if over <= 0 else f"{text[: self.max_characters]}… ({over} more characters)"


class _ClosedPool:
    """Placeholder for a pool if no block will be run."""

    def session(self) -> Any:
        raise AssertionError("nothing is sampled")

    def close(self) -> None:
        """Does nothing."""


def open_environments(
    settings: Settings, passed: Sequence[str], log: Path | None, progress: Progress, played: bool = True
) -> Environments:
    """The environments of a recipe.

    `passed`, `log`: see `ProcessEnvironments`. `played`: False if no block will be run, so that no sandbox is needed.
    Raises UsageError if they cannot run here.
    """
    if settings.name != "python":
        return ProcessEnvironments(settings, passed, log, progress)
    return PythonEnvironments(_python_pool(settings) if played else _ClosedPool(), settings.workers)


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
