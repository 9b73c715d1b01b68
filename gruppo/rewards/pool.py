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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

from gruppo.errors import UsageError
from gruppo.reporting import Advance
from gruppo.rewards import RewardFunction, combine, reward_path
from gruppo.types import Completion, Prompt, Reward

LOAD_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call gave: G values (a number, None, or the reason of a failure) and what the function logged."""

    values: list[float | str | None]
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
    ) -> None:
        """`columns`: those that rows offer besides the prompt; `timeout` in seconds a call; `log`: file for what
        rewards print. Raises UsageError where a function cannot be imported or called."""
        if not functions:
            raise UsageError('reward.functions = []: there is no reward; write e.g. functions = ["number"]')
        self.names = _unique([_name(function) for function in functions])
        self.weights = list(weights) or [1.0] * len(functions)
        if len(self.weights) != len(functions):
            raise UsageError(f"reward.weights = {self.weights}: {len(functions)} functions need as many weights")
        self.timeout = timeout
        load = {
            "kind": "load",
            "functions": [reward_path(f) if isinstance(f, str) else _carried(f) for f in functions],
            "columns": list(columns),
            "path": sys.path,
        }
        self._load, self._log = pickle.dumps(load), log
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._load, log))
            for worker in self._workers:
                worker.ready()
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
        abstain, with the reason; a value that is not a finite number makes its own completion abstain.
        """
        jobs = [(index, function) for index in range(len(groups)) for function in range(len(self.names))]
        arguments = [_arguments(prompt, completions) for prompt, completions in groups]
        outcomes: dict[tuple[int, int], Outcome] = {}

        def call(job: tuple[int, int]) -> bytes:
            message = {"kind": "call", "function": job[1], "arguments": arguments[job[0]], "state": dict(state)}
            return pickle.dumps(message)

        def done(job: tuple[int, int], answer: Mapping[str, Any]) -> None:
            outcomes[job] = _outcome(answer, len(groups[job[0]][1]))
            if advance is not None:
                advance(1 / len(self.names))

        self._run(deque(jobs), call, done)
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
        jobs: deque[tuple[int, int]],
        call: Callable[[tuple[int, int]], bytes],
        done: Callable[[tuple[int, int], Mapping[str, Any]], None],
    ) -> None:
        busy: dict[_Worker, tuple[tuple[int, int], float]] = {}
        while jobs or busy:
            for worker in self._workers:
                if jobs and worker not in busy:
                    job = jobs.popleft()
                    busy[worker] = job, time.monotonic() + self.timeout
                    worker.send(call(job))
            patience = max(0.0, min(deadline for _, deadline in busy.values()) - time.monotonic())
            ready = wait([worker.answers for worker in busy], patience)
            for worker, (job, deadline) in list(busy.items()):
                if worker.answers in ready:
                    answer = worker.receive()
                elif time.monotonic() >= deadline:
                    answer = {"failure": f"took longer than reward.timeout = {self.timeout:g} s"}
                    worker.kill()
                else:
                    continue
                del busy[worker]
                if worker.dead:
                    self._replace(worker)
                done(job, answer)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        fresh = _Worker(self._load, self._log)
        self._workers[self._workers.index(worker)] = fresh
        fresh.ready()


class _Worker:
    """A reward process and the two pipes to it."""

    def __init__(self, load: bytes, log: Path | None) -> None:
        call_read, call_write = os.pipe()
        answer_read, answer_write = os.pipe()
        with open(log or os.devnull, "ab") as output:
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
        self.dead = False
        self.send(load)

    def send(self, message: bytes) -> None:
        """Send; a process that died is noticed when its answer is read."""
        with contextlib.suppress(BrokenPipeError):
            self.calls.send_bytes(message)

    def receive(self) -> dict[str, Any]:
        """The answer that has arrived; a failure where the process is gone or speaks nonsense."""
        try:
            answer = json.loads(self.answers.recv_bytes())
            if isinstance(answer, dict):
                return answer
            raise ValueError("not an answer")
        except (EOFError, OSError, ValueError):
            self.kill()
            code = self.process.returncode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            return {"failure": f"its process died ({how})"}

    def ready(self) -> None:
        """Wait until the functions are loaded. Raises UsageError where they cannot be."""
        if not wait([self.answers], LOAD_TIMEOUT):
            self.kill()
            raise UsageError(f"reward.functions: importing them took longer than {LOAD_TIMEOUT:g} s; import less")
        answer = self.receive()
        if problem := answer.get("error") or answer.get("failure"):
            self.kill()
            raise UsageError(problem if "error" in answer else f"reward.functions: while importing them, {problem}")

    def kill(self) -> None:
        """Kill the process and whatever it started."""
        self.dead = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.calls, self.answers):
            pipe.close()


def _carried(function: RewardFunction) -> bytes:
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
    return str(getattr(function, "__name__", type(function).__name__))


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.index(name) == place else f"{name}_{place}" for place, name in enumerate(names)]


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


def _outcome(answer: Mapping[str, Any], count: int) -> Outcome:
    if "failure" in answer:
        return Outcome([_writable(answer["failure"])] * count, {}, {})
    values = [_writable(value["bad"]) if isinstance(value, dict) else value for value in answer["values"]]
    return Outcome(values, answer["metrics"], answer["extra"])


def _writable(text: str) -> str:
    """Text that UTF-8 files can hold: lone surrogates replaced."""
    return text.encode("utf-8", "replace").decode()
