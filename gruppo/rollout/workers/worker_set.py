"""Worker processes that have loaded the same code, and their replacements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from gruppo.errors import RunError, UsageError
from gruppo.rollout.workers.process import TICK_SECONDS, Worker, kill, wait
from gruppo.utils.progress import Advance, Progress

# Before each new try to load the code, in seconds. The reason may be temporary: a lack of memory, or of a file server.
PAUSES = (1.0, 4.0, 16.0)

MOST_LOST = 3  # processes or machines that are lost under the same call

AnyWorker = TypeVar("AnyWorker", bound=Worker)


class WorkerSet(Generic[AnyWorker]):
    """Worker processes, all with the same code.

    A process that dies while it loads the code is started again, up to len(PAUSES) times. So is a replacement that
    fails to load in any other way, as the code could be loaded at the beginning. `notify` is called with a description
    of each such failure.
    """

    def __init__(self, start: Callable[[int, float], AnyWorker], count: int, label: str, progress: Progress) -> None:
        """Start `count` processes and wait until they have loaded the code.

        `start`: starts a process, given its place and after how many seconds; `label`: of the progress bar. Raises
        UsageError if the code cannot be loaded, or is not the same on all machines.
        """
        self._start = start
        self.notify: Callable[[str], None] = progress.note
        self.members: list[AnyWorker] = []
        self.digests: list[str] = []  # hash of each function's or class's code
        try:
            for place in range(count):
                self.members.append(start(place, 0.0))
            with progress.bar(label, count, "processes") as show:
                for place in range(count):
                    self._await(place, show)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[AnyWorker]:
        return iter(self.members)

    def _await(self, place: int, show: Advance) -> None:
        """Wait until a process has loaded the code, at the beginning."""
        while not (worker := self.members[place]).loaded:
            if (answer := worker.answer_by(worker.load_by)) is None:
                wait([worker], TICK_SECONDS)
                show(0)
            elif "digests" in answer:
                worker.accept(answer)
                self.digests = self.digests or answer["digests"]
                if answer["digests"] != self.digests:
                    raise UsageError(f"{worker.field}: the code is not the same on all machines; install the same")
                show(1)
            elif "lost" in answer:
                self._put(worker, 0.0, worker.tries)
            elif "error" in answer:
                raise UsageError(answer["error"])
            elif worker.timed_out or not self._again(worker, answer["failure"]):
                raise UsageError(f"{worker.field}: {worker.doing} failed: {answer['failure']}; {worker.advice}")

    def loaded(self, worker: AnyWorker, answer: Mapping[str, Any]) -> None:
        """Take a replacement's answer to the load message. Raises RunError if it cannot replace the lost process."""
        if "lost" in answer:
            self._put(worker, 0.0, worker.tries)
            return
        if answer.get("digests") == self.digests:
            worker.accept(answer)
            return
        lost = f"{worker.field}: a process was replaced, but"
        if "digests" in answer:
            raise RunError(f"{lost} the code has changed since the run began; restore it and continue with --resume")
        why = str(answer.get("error") or answer.get("failure") or "invalid answer")
        if not self._again(worker, why):
            tries = f"in {len(PAUSES) + 1} tries"
            raise RunError(f"{lost} {worker.doing} failed {tries} ({why}); fix it and continue with --resume")

    def _again(self, worker: AnyWorker, why: str) -> bool:
        """Replace a process that has failed to load. Returns whether it may try again."""
        if worker.tries > len(PAUSES):
            return False
        pause = PAUSES[worker.tries - 1]
        self.notify(f"{worker.field}: {worker.doing} failed ({why}); trying again in {pause:g} s")
        self._put(worker, pause, worker.tries + 1)
        return True

    def alive(self, worker: AnyWorker) -> AnyWorker:
        """The worker, or its replacement if its process has ended after it had loaded the code."""
        return self.replace(worker) if worker.loaded and worker.process.gone else worker

    def replace(self, worker: AnyWorker) -> AnyWorker:
        """Kill a process and start another in its place."""
        return self._put(worker, 0.0, 1)

    def _put(self, worker: AnyWorker, pause: float, tries: int) -> AnyWorker:
        worker.kill()
        place = self.members.index(worker)
        self.members[place] = replacement = self._start(place, pause)
        replacement.tries = tries
        return replacement

    def close(self) -> None:
        """Kill all processes."""
        kill(self.members)
        self.members = []


def lost_too_often(answer: Mapping[str, Any], times: int) -> Mapping[str, Any]:
    """The answer to a call whose process was lost `times` times: a failure, if no other one shall be tried."""
    if times < MOST_LOST:
        return answer
    return {"failure": f"its process was lost {times} times; the last time: {answer['lost']}"}
