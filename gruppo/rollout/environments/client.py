"""The trainer's side of environments: Python blocks in sandboxes, or a user-defined class in worker processes, where it
can hang or crash without affecting the trainer."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from gruppo.config.sections import Environment as Settings
from gruppo.config.units import as_bytes
from gruppo.rollout.environments.python_tool import Pool, PythonBlocks
from gruppo.rollout.sandbox import Limits, PythonPool
from gruppo.rollout.workers.process import TICK_SECONDS, Launcher, LocalLauncher, Worker, wait
from gruppo.rollout.workers.scoring import pickled
from gruppo.rollout.workers.worker_set import WorkerSet, lost_too_often
from gruppo.utils.imports import files_to_send
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


_AGAIN = Answer(failure="the call has to be made again")


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

    def __init__(
        self,
        settings: Settings,
        passed: Sequence[str],
        log: Path | None,
        progress: Progress,
        launcher: Launcher | None = None,
    ) -> None:
        """`passed`: names of environment variables that the processes get; `log`: file for the class's output;
        `launcher`: see `RewardPool`. Raises UsageError if the class cannot be loaded."""
        self.name, self.seconds, self.max_characters = settings.name, settings.seconds, settings.output
        load = {"kind": "load", "name": settings.name, "options": dict(settings.options), "path": sys.path}
        load["files"] = files_to_send([settings.name]) if launcher else {}
        message, memory = pickled(load), as_bytes(settings.memory)
        self._launcher = launcher or LocalLauncher(log)
        self._places: dict[int, _Host] = {}  # by number of the completion: the process that has its object

        def start(place: int, delay: float) -> _Host:
            return _Host(message, partial(self._launcher.launch, place), memory, passed, delay)

        try:
            count = settings.workers * self._launcher.machines
            self._workers = WorkerSet(start, count, "Loading the environment", progress)
        except BaseException:
            self._launcher.close()
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
        self._launcher.close()

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """See `Environments`."""
        self._workers.notify = notify

    def _ask(self, kind: str, plays: Sequence[EnvironmentHandle], tick: Tick) -> list[Answer]:
        """Make one call per completion; processes work in parallel. A completion uses the same process as long as that
        is there, or will be again before its machine is."""
        queues: list[deque[int]] = [deque() for _ in self._workers.members]
        self._queue(range(len(plays)), plays, queues, ())
        answers: dict[int, Answer] = {}
        lost: Counter[int] = Counter()
        busy: dict[int, tuple[int | None, float]] = {}
        try:
            while len(answers) < len(plays):
                for place in range(len(queues)):
                    if place not in busy and queues[place]:
                        busy[place] = self._start_call(place, queues[place], kind, plays)
                patience = min(self._workers.members[place].patience(deadline) for place, (_, deadline) in busy.items())
                wait([self._workers.members[place] for place in busy], min(max(0.0, patience), TICK_SECONDS))
                for place, (index, deadline) in list(busy.items()):
                    answer = self._collect(place, index, deadline, lost)
                    if answer is None:
                        continue
                    del busy[place]
                    moved()
                    if answer is _AGAIN:  # by any process: nothing of the completion is left here
                        waiting = [*([] if index is None else [index]), *queues[place]]
                        queues[place].clear()
                        self._queue(waiting, plays, queues, busy)
                    elif index is not None:
                        answers[index] = answer
                        if answer.failure:
                            self._places.pop(plays[index].number, None)
                tick()
        except BaseException:
            for place in busy:
                self._workers.replace(self._workers.members[place])
            raise
        return [answers[number] for number in range(len(plays))]

    def _queue(
        self,
        calls: Iterable[int],
        plays: Sequence[EnvironmentHandle],
        queues: Sequence[deque[int]],
        busy: Collection[int],
    ) -> None:
        """Give calls to the places of the processes that their completions use: those on machines that are there,
        unless none is. `busy`: the places of processes that have not answered."""
        for place, worker in enumerate(list(self._workers)):
            if worker.process.began == math.inf and place not in busy:
                self._workers.alive(worker)
        places = [place for place, worker in enumerate(self._workers) if worker.process.began < math.inf]
        places = places or list(range(len(queues)))
        for number in calls:
            queues[places[plays[number].number % len(places)]].append(number)

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

    def _collect(self, place: int, index: int | None, deadline: float, lost: Counter[int]) -> Answer | None:
        worker = self._workers.members[place]
        content: Mapping[str, Any] | None = worker.answer_by(deadline)
        if content is None:
            return None
        if index is None:
            self._workers.loaded(worker, content)
            return _AGAIN if "lost" in content else Answer()
        if worker.dead:
            self._workers.replace(worker)
        if "lost" in content:
            lost[index] += 1
            content = lost_too_often(content, lost[index])
        return _AGAIN if "lost" in content else self._read(content)

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


class Elsewhere(Protocol):
    """Other machines on which the environments of a recipe run. `machines`: their number."""

    machines: int

    def launcher(self, log: Path | None) -> Launcher:
        """Starts processes on them. `log`: file for what these print."""

    def sandboxes(self, settings: Settings) -> Pool:
        """Sandboxes on all of them. Raises UsageError if one of them cannot have any."""


def open_environments(
    settings: Settings,
    passed: Sequence[str],
    log: Path | None,
    progress: Progress,
    played: bool = True,
    elsewhere: Elsewhere | None = None,
) -> Environments:
    """The environments of a recipe.

    `passed`, `log`: see `ProcessEnvironments`. `played`: False if no block will be run, so that no sandbox is needed.
    `elsewhere`: where they run, if not on this machine. Raises UsageError if they cannot run there.
    """
    if settings.name != "python":
        launcher = None if elsewhere is None else elsewhere.launcher(log)
        return ProcessEnvironments(settings, passed, log, progress, launcher)
    if not played:
        return PythonEnvironments(_ClosedPool(), settings.workers)
    if elsewhere is None:
        return PythonEnvironments(python_pool(settings), settings.workers)
    return PythonEnvironments(elsewhere.sandboxes(settings), settings.workers * elsewhere.machines)


def python_pool(settings: Settings) -> PythonPool:
    """Sandboxes on this machine. Raises UsageError if it cannot have any."""
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
