"""Processes that run reward functions, so that a reward can hang, crash or lie without touching the trainer.

One call is one function on one group. A worker runs one call at a time; a call that outlives the timeout is killed
with its process and everything that it started, and the worker is replaced. Time to load functions is not a call's.
"""

from __future__ import annotations

import math
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import cloudpickle

from gruppo.errors import RunError, UsageError
from gruppo.rewards import RewardFunction, check_option_names, reward_path
from gruppo.rewards.combine import Value, combine
from gruppo.rollout.workers.log import Output
from gruppo.rollout.workers.process import LOAD_TIMEOUT, TICK_SECONDS, Worker, reload_problem, wait, writable_message
from gruppo.types import Completion, Prompt, Reward, Steps
from gruppo.utils.progress import Advance, NullProgress, Progress

_Job = tuple[int, int]  # group, function


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call gave: G values and what the function logged."""

    values: list[Value]
    metrics: Mapping[str, Sequence[float]]
    extra: Mapping[str, Sequence[Any]]


class RewardPool:
    """Scores groups with reward functions in processes of their own. Close it, or use it as a context."""

    def __init__(
        self,
        functions: Sequence[str | RewardFunction],
        weights: Sequence[float],
        columns: Sequence[str],
        timeout: float = 10.0,
        workers: int = 2,
        log: Path | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        memory: int = 0,
        environment: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """`columns`: those that rows offer besides the prompt; `timeout` in seconds a call; `log`: file for what
        rewards print; `options`: keyword arguments of functions, by the name in `functions`; `memory`: bytes that each
        process may hold, 0 for no limit; `environment`: names of variables that are passed on, besides the usual ones
        (gruppo.rollout.workers.limits). Raises UsageError where a function cannot be imported, made with its options, or
        called."""
        if not functions and workers:
            raise UsageError('reward.functions = []: there is no reward; write e.g. functions = ["last_number"]')
        self.names = _unique([_name(function) for function in functions])
        self.weights = list(weights) or [1.0] * len(functions)
        if len(self.weights) != len(functions):
            raise UsageError(f"reward.weights = {self.weights}: {len(functions)} functions need as many weights")
        self.timeout, self.columns, self.environment = timeout, list(columns), list(environment)
        options = options or {}
        check_option_names(functions, options)
        self.paths = [each if isinstance(each, str) else None for each in functions]
        self.options = [dict(options.get(each, {})) if isinstance(each, str) else {} for each in functions]
        load = {
            "kind": "load",
            "rewards": [
                (reward_path(f), f, dict(options.get(f, {}))) if isinstance(f, str) else (_carried(f), _name(f), {})
                for f in functions
            ],
            "columns": list(columns),
            "path": sys.path,
        }
        self._load, self._memory = pickled(load), memory
        self._workers: list[Worker] = []
        self._output = Output(log) if log is not None else None
        try:
            for _ in range(workers):
                self._workers.append(self._new_worker())
            with (progress or NullProgress()).bar("Loading reward functions", workers, "processes") as show:
                loaded = [worker.load(show) for worker in self._workers]
            self.digests = loaded[0] if loaded else []
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        if self._output is not None:
            self._output.close()
            self._output = None

    def score(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Completion]]],
        state: Mapping[str, Any],
        advance: Advance | None = None,
    ) -> tuple[list[list[Reward]], dict[str, list[float]]]:
        """Rewards of every completion of every group, and what the functions logged as metrics.

        `state` becomes `trainer_state`. A call that raises, hangs, dies or returns nonsense makes its completions
        abstain, with the reason; a value that is not a finite number makes its own completion abstain. `advance` is
        called at least every half second and may raise: then the processes that are busy are replaced.
        """
        jobs = [(index, function) for index in range(len(groups)) for function in range(len(self.names))]
        arguments = [call_arguments(prompt, completions) for prompt, completions in groups]
        outcomes: dict[_Job, Outcome] = {}
        show = advance or (lambda _: None)

        def call(job: _Job) -> bytes:
            message = {"kind": "call", "function": job[1], "arguments": arguments[job[0]], "state": dict(state)}
            return pickled(message)

        def done(job: _Job, answer: Mapping[str, Any]) -> None:
            outcomes[job] = _outcome(answer, groups[job[0]][1])
            show(1 / len(self.names))

        self._run(deque(jobs), call, done, lambda: show(0))
        metrics: dict[str, list[float]] = {}
        for outcome in (outcomes[job] for job in jobs):
            for name, values in outcome.metrics.items():
                metrics.setdefault(name, []).extend(values)
        rewards = [
            [self._reward([outcomes[index, f] for f in range(len(self.names))], number) for number in range(len(group))]
            for index, (_, group) in enumerate(groups)
        ]
        return rewards, metrics

    def _reward(self, outcomes: Sequence[Outcome], number: int) -> Reward:
        values = [outcome.values[number] for outcome in outcomes]
        extra = {key: column[number] for o in outcomes for key, column in o.extra.items() if number < len(column)}
        return combine(self.names, self.weights, values, extra)

    def _run(
        self,
        jobs: deque[_Job],
        call: Callable[[_Job], bytes],
        done: Callable[[_Job, Mapping[str, Any]], None],
        tick: Callable[[], None],
    ) -> None:
        """Give jobs to idle workers until all are done. A worker without a job may be loading its functions."""
        busy: dict[Worker, tuple[_Job | None, float]] = {}
        try:
            while jobs or any(job is not None for job, _ in busy.values()):
                for worker in [each for each in self._workers if each not in busy]:
                    if worker.process.poll() is not None:  # by what an earlier call left behind
                        worker.kill()
                        worker = self._replace(worker)  # noqa: PLW2901
                    if not worker.loaded:
                        busy[worker] = None, time.monotonic() + LOAD_TIMEOUT
                    elif jobs:
                        busy[worker] = jobs[0], time.monotonic() + self.timeout
                        worker.send(call(jobs.popleft()))
                patience = max(0.0, min(deadline for _, deadline in busy.values()) - time.monotonic())
                wait(busy, min(patience, TICK_SECONDS))
                self._collect(busy, done)
                tick()
        except BaseException:
            for worker in busy:
                worker.kill()
                self._replace(worker)
            raise

    def _collect(
        self, busy: dict[Worker, tuple[_Job | None, float]], done: Callable[[_Job, Mapping[str, Any]], None]
    ) -> None:
        """Take the answers that have come, and give up on workers whose time is over."""
        for worker, (job, deadline) in list(busy.items()):
            answer = worker.answer_by(deadline)
            if answer is None:
                continue
            del busy[worker]
            if worker.dead:
                self._replace(worker)
            if job is not None:
                done(job, answer)
            elif answer.get("digests") == self.digests:
                worker.loaded = True
            else:
                raise RunError(reload_problem(answer))

    def _new_worker(self) -> Worker:
        return Worker(self._load, self._output, self._memory, self.environment)

    def _replace(self, worker: Worker) -> Worker:
        self._workers[self._workers.index(worker)] = made = self._new_worker()
        return made


def pickled(message: Mapping[str, Any]) -> bytes:
    """cloudpickle carries more but is slower."""
    try:
        return pickle.dumps(message)
    except Exception:  # noqa: BLE001  a column can be any object
        return cloudpickle.dumps(message)  # type: ignore[no-any-return]


def _carried(function: RewardFunction) -> bytes:
    if not callable(function):
        raise UsageError(f"reward = {function!r}: neither a function nor an import path; give one of them")
    try:
        return cloudpickle.dumps(function)  # type: ignore[no-any-return]
    except Exception as error:
        raise UsageError(
            f"reward = {_name(function)}: cannot be carried into its own process ({type(error).__name__}: {error}); "
            'define it in a file and pass "file.py:name"'
        ) from error


def _name(function: str | RewardFunction) -> str:
    if isinstance(function, str):
        return function.rpartition(":")[2]
    original = getattr(function, "func", function)  # a partial has no name of its own
    return str(getattr(original, "__name__", type(original).__name__))


def _unique(names: Sequence[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(1))
        unique.append(name if name not in unique else next(each for each in numbered if each not in unique))
    return unique


def call_arguments(prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
    """What a reward function is called with: every list has G entries."""
    size = len(completions)
    conversation = not isinstance(prompt.content, str)
    return {
        **{name: [value] * size for name, value in prompt.columns.items()},
        "prompts": [prompt.content] * size,
        "completions": [[{"role": "assistant", "content": c.text}] if conversation else c.text for c in completions],
        "completion_ids": [list(completion.token_ids) for completion in completions],
    }


def _outcome(answer: Mapping[str, Any], completions: Sequence[Completion]) -> Outcome:
    if "failure" not in answer:
        try:
            values, metrics, extra = answer["values"], answer["metrics"], answer["extra"]
            _require_form(values, metrics, extra)
            made = [_value(value, each) for value, each in zip(values, completions, strict=True)]
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            answer = {"failure": "its process gave an answer of no use; does it change Python's own modules?"}
        else:
            return Outcome(made, metrics, extra)
    return Outcome([answer["failure"]] * len(completions), {}, {})


def _require_form(values: Any, metrics: Any, extra: Any) -> None:
    """Raise ValueError unless an answer's parts are of the form that the worker gives them: a function runs in the
    process that answers, and can have changed anything in it."""
    logged = [each for column in metrics.values() for each in column]
    if not all(type(each) in (int, float) for each in logged):
        raise ValueError("a metric that is no number")
    if not all(isinstance(column, list) for column in (values, *extra.values())):
        raise ValueError("no lists")


def _value(value: Any, completion: Completion) -> Value:
    """A value as it came out of the worker; ends of steps that do not fit the completion are a failure."""
    if value is None:
        return None
    if not isinstance(value, dict):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError("no finite number")
        return float(value)
    if "bad" in value:
        return writable_message(str(value["bad"]))
    rewards, ends = (tuple(value[name]) for name in ("rewards", "ends"))
    if not all(type(each) in (int, float) for each in rewards) or not all(type(each) is int for each in ends):
        raise ValueError("no numbers")
    steps, size = Steps(rewards, ends), len(completion.token_ids)
    rising = all(before < after for before, after in pairwise(steps.ends))
    if len(steps.ends) != len(steps.rewards) or not rising or not all(0 <= end < size for end in steps.ends):
        return (
            f"step_ends = {list(steps.ends)[:20]} for {len(steps.rewards)} step_rewards and {size} tokens: must be one "
            "a reward, rising, and within the completion"
        )
    return steps
