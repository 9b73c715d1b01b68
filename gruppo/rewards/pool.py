"""Processes that run reward functions, so that a reward can hang, crash or lie without touching the trainer.

One call is one function on one group. A worker runs one call at a time; a call that outlives the timeout is killed
with its process and everything that it started, and the worker is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

from gruppo.errors import RunError, UsageError
from gruppo.reporting import Advance
from gruppo.rewards import RewardFunction, Value, check_option_names, combine, reward_path
from gruppo.types import Completion, Prompt, Reward, Steps

LOAD_TIMEOUT = 120.0
TICK_SECONDS = 0.5

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
    ) -> None:
        """`columns`: those that rows offer besides the prompt; `timeout` in seconds a call; `log`: file for what
        rewards print; `options`: keyword arguments of functions, by the name in `functions`. Raises UsageError where
        a function cannot be imported, made with its options, or called."""
        if not functions:
            raise UsageError('reward.functions = []: there is no reward; write e.g. functions = ["number"]')
        self.names = _unique([_name(function) for function in functions])
        self.weights = list(weights) or [1.0] * len(functions)
        if len(self.weights) != len(functions):
            raise UsageError(f"reward.weights = {self.weights}: {len(functions)} functions need as many weights")
        self.timeout = timeout
        options = options or {}
        check_option_names(functions, options)
        load = {
            "kind": "load",
            "rewards": [
                (reward_path(f), f, dict(options.get(f, {}))) if isinstance(f, str) else (_carried(f), _name(f), {})
                for f in functions
            ],
            "columns": list(columns),
            "path": sys.path,
        }
        self._load, self._log = _pickled(load), log
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._load, log))
            loaded = [worker.load() for worker in self._workers]
            self.digests = loaded[0]
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
        arguments = [_arguments(prompt, completions) for prompt, completions in groups]
        outcomes: dict[_Job, Outcome] = {}
        show = advance or (lambda _: None)

        def call(job: _Job) -> bytes:
            message = {"kind": "call", "function": job[1], "arguments": arguments[job[0]], "state": dict(state)}
            return _pickled(message)

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
        busy: dict[_Worker, tuple[_Job | None, float]] = {}
        try:
            while jobs or any(job is not None for job, _ in busy.values()):
                for worker in self._workers:
                    if worker in busy:
                        continue
                    if not worker.loaded:
                        busy[worker] = None, time.monotonic() + LOAD_TIMEOUT
                    elif jobs:
                        busy[worker] = jobs[0], time.monotonic() + self.timeout
                        worker.send(call(jobs.popleft()))
                patience = max(0.0, min(deadline for _, deadline in busy.values()) - time.monotonic())
                wait([worker.answers for worker in busy], min(patience, TICK_SECONDS))
                self._collect(busy, done)
                tick()
        except BaseException:
            for worker in busy:
                worker.kill()
                self._replace(worker)
            raise

    def _collect(
        self, busy: dict[_Worker, tuple[_Job | None, float]], done: Callable[[_Job, Mapping[str, Any]], None]
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
                raise RunError(_reload_problem(answer))

    def _replace(self, worker: _Worker) -> None:
        self._workers[self._workers.index(worker)] = _Worker(self._load, self._log)


class _Worker:
    """A reward process and the two pipes to it."""

    def __init__(self, load: bytes, log: Path | None) -> None:
        try:
            output = open(log or os.devnull, "ab")  # noqa: SIM115  before there are pipes that would stay open
        except OSError as error:
            raise UsageError(f"{log}: cannot be written to ({error}); remove it") from error
        call_read, call_write = os.pipe()
        answer_read, answer_write = os.pipe()
        with output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gruppo.rewards.worker", str(call_read), str(answer_write)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(call_read, answer_write),
                start_new_session=True,
            )
        os.close(call_read)
        os.close(answer_write)
        self.calls, self.answers = Connection(call_write, readable=False), Connection(answer_read, writable=False)
        self.dead = self.loaded = False
        self.send(load)

    def send(self, message: bytes) -> None:
        """Send; a process that died is noticed when its answer is read."""
        with contextlib.suppress(BrokenPipeError):
            self.calls.send_bytes(message)

    def answer_by(self, deadline: float) -> dict[str, Any] | None:
        """The answer that has arrived, a failure where the process is gone or the deadline is past, else None."""
        if self.answers.poll():
            return self._receive()
        if time.monotonic() < deadline:
            return None
        self.kill()
        return {"failure": "took longer than its time (reward.timeout)"}

    def _receive(self) -> dict[str, Any]:
        try:
            answer = json.loads(self.answers.recv_bytes())
            if isinstance(answer, dict):
                return answer
            raise ValueError("not an answer")
        except (EOFError, OSError, ValueError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self.kill()
            return {"failure": f"its process died ({_how(self.process.returncode)}); see rewards.log"}

    def load(self) -> list[str]:
        """Wait until the functions are loaded; a hash of each one's code. Raises UsageError where they cannot be."""
        if not wait([self.answers], LOAD_TIMEOUT):
            self.kill()
            raise UsageError(
                f"reward.functions: loading them takes longer than {LOAD_TIMEOUT:.0f} s; do less at import, and "
                "download a reward model before the run: hf download NAME"
            )
        answer = self._receive()
        if "digests" in answer:
            self.loaded = True
            digests: list[str] = answer["digests"]
            return digests
        self.kill()
        raise UsageError(str(answer.get("error") or f"reward.functions: while importing them, {answer['failure']}"))

    def kill(self) -> None:
        """Kill the process and its process group."""
        self.dead = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.calls, self.answers):
            pipe.close()


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _reload_problem(answer: Mapping[str, Any]) -> str:
    """Why a replaced reward process cannot go on with the functions that the run began with."""
    why = answer.get("error") or answer.get("failure") or "its code has changed since the run began"
    return f"a reward process was replaced, and its functions could not be loaded again ({why}); mend them and resume"


def _pickled(message: Mapping[str, Any]) -> bytes:
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


def _arguments(prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
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
    if "failure" in answer:
        return Outcome([_writable(answer["failure"])] * len(completions), {}, {})
    values = [_value(value, each) for value, each in zip(answer["values"], completions, strict=True)]
    return Outcome(values, answer["metrics"], answer["extra"])


def _value(value: Any, completion: Completion) -> Value:
    """A value as it came out of the worker; ends of steps that do not fit the completion are a failure."""
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]
    if "bad" in value:
        return _writable(value["bad"])
    steps, size = Steps(tuple(value["rewards"]), tuple(value["ends"])), len(completion.token_ids)
    rising = all(before < after for before, after in pairwise(steps.ends))
    if len(steps.ends) != len(steps.rewards) or not rising or not all(0 <= end < size for end in steps.ends):
        return (
            f"step_ends = {list(steps.ends)[:20]} for {len(steps.rewards)} step_rewards and {size} tokens: must be one "
            "a reward, rising, and within the completion"
        )
    return steps


def _writable(text: str) -> str:
    """Text that UTF-8 files can hold: lone surrogates replaced."""
    return text.encode("utf-8", "replace").decode()
