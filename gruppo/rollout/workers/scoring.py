"""The calls of reward functions on the groups of a step."""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cloudpickle

from gruppo.rewards.combine import combine
from gruppo.rollout.workers.outcomes import Outcome, call_arguments, outcome_of
from gruppo.rollout.workers.process import TICK_SECONDS, Worker, wait
from gruppo.rollout.workers.worker_set import WorkerSet, lost_too_often
from gruppo.types import Completion, Prompt, Reward
from gruppo.utils.progress import Advance
from gruppo.utils.waiting import moved, waiting_for

_Job = tuple[int, int]  # place of a group, function
Scored = tuple[list[list[Reward]], dict[str, list[float]]]


class Scoring:
    """Gives calls to the workers of a pool, one call at a time to each. Groups may be added while others are scored.

    Idle workers take the calls of the first function first, in the order in which groups were added. A worker stays
    with a function as long as there are calls of it, because looking for what a function leaves behind takes time.
    Values, metrics and seeds do not depend on that order.

    Use it as a context manager: if the block raises, the workers that are busy are replaced.
    """

    def __init__(
        self,
        workers: WorkerSet[Worker],
        names: Sequence[str],
        weights: Sequence[float],
        timeout: float,
        prompts: Sequence[Prompt],
        state: Mapping[str, Any],
        stale: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """`names`, `weights`: of the functions; `prompts`: of the groups; `state`: becomes `trainer_state`; `stale`: is
        called with the answer of a process that has to be replaced before another function is called in it."""
        self._workers, self._names, self._weights, self._timeout = workers, names, weights, timeout
        self._state, self._stale = dict(state), stale
        self._prompts, self._groups = prompts, dict[int, Sequence[Completion]]()
        self._arguments: dict[int, dict[str, Any]] = {}
        self._waiting: list[deque[int]] = [deque() for _ in names]  # places of groups, by function
        self._busy: dict[Worker, tuple[_Job | None, float]] = {}  # without a job: loading its functions
        self._last: dict[Worker, int] = {}  # the function that a worker was called with last
        self._lost: Counter[_Job] = Counter()
        self._outcomes: dict[_Job, Outcome] = {}
        self._show: Advance = lambda _: None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for worker in self._busy:
                self._workers.replace(worker)

    def add(self, place: int, completions: Sequence[Completion]) -> None:
        """Add the group of a prompt. `place`: that of the prompt."""
        self._groups[place] = completions
        self._arguments[place] = call_arguments(self._prompts[place], completions)
        for waiting in self._waiting:
            waiting.append(place)

    def turn(self, seconds: float = 0.0) -> None:
        """Give calls to idle workers, wait at most `seconds` for an answer, and take those that are there."""
        for idle in [worker for worker in self._workers if worker not in self._busy]:
            worker = self._workers.alive(idle)
            if not worker.loaded:
                self._busy[worker] = None, worker.load_by
            elif (job := self._next(worker)) is not None:
                self._busy[worker] = job, time.monotonic() + self._timeout
                worker.send(self._call(job))
        if self._busy:
            patience = min(worker.patience(deadline) for worker, (_, deadline) in self._busy.items())
            wait(self._busy, min(max(0.0, patience), seconds))
            self._collect()

    def finish(self, advance: Advance | None = None) -> Scored:
        """Wait for all calls. Returns the rewards of each group, by its place, and the metrics that the functions
        logged. `advance` is called at least every half second, and may raise."""
        show = advance or (lambda _: None)
        if self._outcomes:
            show(len(self._outcomes) / len(self._names))
        self._show = show
        with waiting_for(self._in_words):
            while any(self._waiting) or any(job is not None for job, _ in self._busy.values()):
                self.turn(TICK_SECONDS)
                show(0)
        metrics: dict[str, list[float]] = {}
        for _, outcome in sorted(self._outcomes.items(), key=lambda item: item[0]):
            for name, values in outcome.metrics.items():
                metrics.setdefault(name, []).extend(values)
        functions = range(len(self._names))
        rewards = [
            [self._reward([self._outcomes[place, one] for one in functions], number) for number in range(len(group))]
            for place, group in sorted(self._groups.items(), key=lambda item: item[0])
        ]
        return rewards, metrics

    def _next(self, worker: Worker) -> _Job | None:
        last = self._last.get(worker, 0)
        for function in (last, *range(len(self._names))):
            if function < len(self._names) and self._waiting[function]:
                self._last[worker] = function
                return self._waiting[function].popleft(), function
        return None

    def _call(self, job: _Job) -> bytes:
        place, function = job
        seed = f"{self._state.get('global_step')}/{self._prompts[place].id}/{self._names[function]}"
        message = {"kind": "call", "function": function, "arguments": self._arguments[place], "state": self._state}
        return pickled({**message, "seed": seed})

    def _collect(self) -> None:
        """Handle the answers that have arrived and the workers whose deadline has passed."""
        for worker, (job, deadline) in list(self._busy.items()):
            answer: Mapping[str, Any] | None = worker.answer_by(deadline)
            if answer is None:
                continue
            del self._busy[worker]
            moved()
            if job is None:
                self._workers.loaded(worker, answer)
                continue
            if worker.dead:
                self._workers.replace(worker)
            if "lost" in answer:
                self._lost[job] += 1
                answer = lost_too_often(answer, self._lost[job])
            if "stale" in answer or "lost" in answer:  # the call was not answered: another process has to
                place, function = job
                self._waiting[function].appendleft(place)
            if "stale" in answer:
                self._stale(answer)
            elif "lost" not in answer:
                self._outcomes[job] = outcome_of(answer, self._groups[job[0]])
                self._show(1 / len(self._names))

    def _reward(self, outcomes: Sequence[Outcome], number: int) -> Reward:
        values = [outcome.values[number] for outcome in outcomes]
        extra = {key: column[number] for o in outcomes for key, column in o.extra.items() if number < len(column)}
        reward = combine(self._names, self._weights, values, extra)
        printed = {name: o.printed for name, o in zip(self._names, outcomes, strict=True) if o.printed}
        return replace(reward, printed=printed) if printed else reward

    def _in_words(self) -> str:
        """What busy workers compute. Called by the thread that watches waits."""
        names = sorted({self._names[job[1]] for job, _ in list(self._busy.values()) if job is not None})
        return f"reward {', '.join(names)}" if names else "a process that loads the rewards"


def pickled(message: Mapping[str, Any]) -> bytes:
    """Pickle a message; with cloudpickle, which supports more types but is slower, only if needed."""
    try:
        return pickle.dumps(message)
    except Exception:  # noqa: BLE001  a column can be any object
        return cloudpickle.dumps(message)  # type: ignore[no-any-return]
