"""Runs reward functions in worker processes, where they can hang, crash or misbehave without affecting the trainer.

One call is one function on one group. A worker runs one call at a time. If a call exceeds the timeout, its process and
everything it started are killed, and the worker is replaced. The time to load functions does not count.
"""

from __future__ import annotations

import math
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Protocol

import cloudpickle

from gruppo.config.labels import options_name, split_label
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Reward as RewardSettings
from gruppo.config.units import bytes_of
from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction, RewardRun, check_option_names, reward_path
from gruppo.rewards.combine import Value, combine
from gruppo.rollout.workers.log import Output
from gruppo.rollout.workers.printed import MOST
from gruppo.rollout.workers.process import TICK_SECONDS, Worker, wait, writable_message
from gruppo.rollout.workers.worker_set import WorkerSet
from gruppo.types import Completion, Prompt, Reward, Steps
from gruppo.utils.cgroups import machine_memory
from gruppo.utils.progress import Advance, NullProgress, Progress
from gruppo.utils.waiting import moved, waiting_for

_Job = tuple[int, int]  # group, function


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one call: G values, the metrics and columns that the function logged, and what it printed."""

    values: list[Value]
    metrics: Mapping[str, Sequence[float]]
    extra: Mapping[str, Sequence[Any]]
    printed: str = ""


class Rewards(Protocol):
    """Scores the groups of a run. The attributes have one entry per reward function, in order.

    `names`: in metrics and tables; `paths`: import paths, None for functions passed from Python; `options`: keyword
    arguments; `digests`: hashes of their code. `columns`, `environment` and `timeout`: what calls get.
    """

    names: list[str]
    weights: list[float]
    paths: list[str | None]
    options: list[dict[str, Any]]
    digests: list[str]
    columns: list[str]
    environment: list[str]
    timeout: float

    def score(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Completion]]],
        state: Mapping[str, Any],
        advance: Advance | None = None,
    ) -> tuple[list[list[Reward]], dict[str, list[float]]]:
        """See `RewardPool.score`."""

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """See `RewardPool.notify_of_restarts`."""

    def close(self) -> None:
        """End what runs the functions."""


class RewardPool:
    """Scores groups with reward functions in worker processes. Close the pool, or use it as a context manager."""

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
        partial_columns: Mapping[str, str] | None = None,
        field: str = "reward.functions",
        cache: Path | None = None,
    ) -> None:
        """Start the processes and load the functions in them.

        `columns`: columns of the rows other than the prompt; `timeout`: in seconds, per call; `log`: file for the
        output of rewards; `options`: keyword arguments of functions, by their name in `functions`; `memory`: limit of
        each process in bytes, 0 for no limit; `environment`: names of environment variables to pass in addition to the
        usual ones (gruppo.rollout.workers.limits); `partial_columns`: see `load_reward`; `field`: the recipe field that
        names the functions; `cache`: file in which rewards may keep answers of servers. Raises UsageError if a function
        cannot be imported, cannot be created with its options or does not accept the arguments.
        """
        if not functions and workers:
            raise UsageError(
                'reward.functions = []: must name at least one reward; write e.g. functions = ["last_number"]'
            )
        self.names = reward_names(functions)
        self.weights = list(weights) or [1.0] * len(functions)
        if len(self.weights) != len(functions):
            raise UsageError(f"reward.weights = {self.weights}: must have one weight per function ({len(functions)})")
        self.timeout, self.columns, self.environment = timeout, list(columns), list(environment)
        options = options or {}
        check_option_names(functions, options)
        self.paths = [f if isinstance(f, str) else None for f in functions]
        self.options = [dict(options.get(options_name(f), {})) if isinstance(f, str) else {} for f in functions]
        load = {
            "kind": "load",
            "rewards": [
                (
                    *((reward_path(f), f, values) if isinstance(f, str) else (_pickled_function(f), _name(f), {})),
                    RewardRun(name, timeout, None if cache is None else cache.absolute()),
                )
                for f, values, name in zip(functions, self.options, self.names, strict=True)
            ],
            "columns": list(columns),
            "partial_columns": dict(partial_columns or {}),
            "path": sys.path,
        }
        message = pickled(load)
        self._output = Output(log) if log is not None else None

        def start(delay: float) -> Worker:
            worker = Worker(message, self._output, memory, self.environment, delay)
            worker.field = field
            return worker

        try:
            label = "Loading reward functions"
            self._workers = WorkerSet(start, workers, label, progress or NullProgress())
        except BaseException:
            self._close_output()
            raise
        self.digests, self.notify = self._workers.digests, self._workers.notify
        self._reported: set[tuple[str, str]] = set()  # functions, and what they have changed in their processes

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes."""
        self._workers.close()
        self._close_output()

    def _close_output(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Have `notify` called with the reason when processes are restarted because they failed to load the functions,
        or because of what a function has changed in them."""
        self.notify = self._workers.notify = notify

    def score(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Completion]]],
        state: Mapping[str, Any],
        advance: Advance | None = None,
    ) -> tuple[list[list[Reward]], dict[str, list[float]]]:
        """Score every completion of every group. Returns the rewards and the metrics that the functions logged.

        `state` becomes `trainer_state`. If a call raises, hangs, dies or returns an invalid result, its completions are
        excluded, with the reason; if a value is not a finite number, only its own completion is excluded. `advance` is
        called at least every half second and may raise; busy processes are then replaced.
        """
        jobs = [(index, function) for function in range(len(self.names)) for index in range(len(groups))]
        arguments = [call_arguments(prompt, completions) for prompt, completions in groups]
        outcomes: dict[_Job, Outcome] = {}
        show = advance or (lambda _: None)

        def call(job: _Job) -> bytes:
            index, function = job
            seed = f"{state.get('global_step')}/{groups[index][0].id}/{self.names[function]}"
            message = {"kind": "call", "function": function, "arguments": arguments[index], "state": dict(state)}
            return pickled({**message, "seed": seed})

        def done(job: _Job, answer: Mapping[str, Any]) -> None:
            outcomes[job] = outcome_of(answer, groups[job[0]][1])
            show(1 / len(self.names))

        self._run(deque(jobs), call, done, lambda: show(0))
        metrics: dict[str, list[float]] = {}
        for outcome in (outcomes[job] for job in sorted(jobs)):
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
        reward = combine(self.names, self.weights, values, extra)
        printed = {name: o.printed for name, o in zip(self.names, outcomes, strict=True) if o.printed}
        return replace(reward, printed=printed) if printed else reward

    def _run(
        self,
        jobs: deque[_Job],
        call: Callable[[_Job], bytes],
        done: Callable[[_Job, Mapping[str, Any]], None],
        tick: Callable[[], None],
    ) -> None:
        """Give jobs to idle workers until all are done. A busy worker without a job is loading its functions."""
        busy: dict[Worker, tuple[_Job | None, float]] = {}
        try:
            with waiting_for(lambda: self._in_words(busy)):
                while jobs or any(job is not None for job, _ in busy.values()):
                    for idle in [worker for worker in self._workers if worker not in busy]:
                        worker = self._workers.alive(idle)
                        if not worker.loaded:
                            busy[worker] = None, worker.load_by
                        elif jobs:
                            busy[worker] = jobs[0], time.monotonic() + self.timeout
                            worker.send(call(jobs.popleft()))
                    patience = max(0.0, min(deadline for _, deadline in busy.values()) - time.monotonic())
                    wait(busy, min(patience, TICK_SECONDS))
                    self._collect(busy, jobs, done)
                    tick()
        except BaseException:
            for worker in busy:
                self._workers.replace(worker)
            raise

    def _in_words(self, busy: Mapping[Worker, tuple[_Job | None, float]]) -> str:
        """What busy workers compute. Called by the thread that watches waits."""
        names = sorted({self.names[job[1]] for job, _ in list(busy.values()) if job is not None})
        return f"reward {', '.join(names)}" if names else "a process that loads the rewards"

    def _collect(
        self,
        busy: dict[Worker, tuple[_Job | None, float]],
        jobs: deque[_Job],
        done: Callable[[_Job, Mapping[str, Any]], None],
    ) -> None:
        """Handle the answers that have arrived and the workers whose deadline has passed."""
        for worker, (job, deadline) in list(busy.items()):
            answer = worker.answer_by(deadline)
            if answer is None:
                continue
            del busy[worker]
            moved()
            if job is None:
                self._workers.loaded(worker, answer)
                continue
            if worker.dead:
                self._workers.replace(worker)
            if "stale" in answer:  # the call was not run: another process has to
                jobs.appendleft(job)
                self._stale(answer)
            else:
                done(job, answer)

    def _stale(self, answer: Mapping[str, Any]) -> None:
        """Report, once, that a function leaves something behind for which its process has to be replaced."""
        number = answer.get("of")
        name = self.names[number] if type(number) is int and 0 <= number < len(self.names) else "a function"
        found = writable_message(str(answer["stale"]))[:200]
        if (name, found) not in self._reported:
            self._reported.add((name, found))
            self.notify(
                f"{name} leaves something changed in its process ({found}), so the process is replaced before another "
                "function is called; undo the change in the function, or make it when the file is imported"
            )


def pickled(message: Mapping[str, Any]) -> bytes:
    """Pickle a message; with cloudpickle, which supports more types but is slower, only if needed."""
    try:
        return pickle.dumps(message)
    except Exception:  # noqa: BLE001  a column can be any object
        return cloudpickle.dumps(message)  # type: ignore[no-any-return]


def _pickled_function(function: RewardFunction) -> bytes:
    if not callable(function):
        raise UsageError(f"reward = {function!r}: must be a function or an import path")
    try:
        return cloudpickle.dumps(function)  # type: ignore[no-any-return]
    except Exception as error:
        raise UsageError(
            f"reward = {_name(function)}: cannot be pickled for its process ({type(error).__name__}: {error}); "
            'define it in a file and pass "file.py:name"'
        ) from error


def _name(function: str | RewardFunction) -> str:
    if isinstance(function, str):
        label, path = split_label(function)
        return label or path.rpartition(":")[2]
    original = getattr(function, "func", function)  # a partial itself has no name
    return str(getattr(original, "__name__", type(original).__name__))


def reward_names(functions: Sequence[str | RewardFunction]) -> list[str]:
    """The names of reward functions in metrics and tables: the label or the name of each, numbered if it repeats."""
    return _unique([_name(function) for function in functions])


def trainer_state(recipe: Recipe, step: int) -> dict[str, int]:
    """State of the run that reward functions get as `trainer_state` in a step, counted from 1."""
    return {"global_step": step - 1, "max_steps": recipe.run.steps, "max_tokens": recipe.sampling.max_tokens}


def memory_per_process(settings: RewardSettings) -> int:
    """Maximum memory of one reward process, in bytes."""
    return bytes_of(settings.memory, machine_memory()) // settings.workers


def _unique(names: Sequence[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(1))
        unique.append(name if name not in unique else next(free for free in numbered if free not in unique))
    return unique


def completion_columns(completions: Sequence[Completion]) -> list[str]:
    """The names of the columns that every one of these completions brings."""
    found = [set(c.episode.columns) if c.episode is not None else set() for c in completions]
    return sorted(set.intersection(*found) - {"completion_ids"}) if found else []


def call_arguments(prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
    """Arguments of a reward function. Every list has G entries."""
    size = len(completions)
    conversation = not isinstance(prompt.content, str)
    of_completions = [{} if c.episode is None else c.episode.columns for c in completions]
    names = dict.fromkeys(name for columns in of_completions for name in columns)
    return {
        **{name: [value] * size for name, value in prompt.columns.items()},
        **{name: [columns.get(name) for columns in of_completions] for name in names},
        "prompts": [prompt.content] * size,
        "prompt_endings": [prompt.ending] * size,
        "completions": [[{"role": "assistant", "content": c.text}] if conversation else c.text for c in completions],
        "completion_ids": [
            columns.get("completion_ids", list(completion.token_ids))
            for columns, completion in zip(of_completions, completions, strict=True)
        ],
    }


def outcome_of(answer: Mapping[str, Any], completions: Sequence[Completion]) -> Outcome:
    """The outcome of a call from the answer of what ran it, which is checked: it can be anything."""
    if "failure" not in answer:
        try:
            values, metrics, extra = answer["values"], answer["metrics"], answer["extra"]
            _require_form(values, metrics, extra)
            checked = [_value(value, completion) for value, completion in zip(values, completions, strict=True)]
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            answer = {"failure": "its process returned an invalid answer; does it change Python's own modules?"}
        else:
            return Outcome(checked, metrics, extra, _printed(answer))
    return Outcome([answer["failure"]] * len(completions), {}, {}, _printed(answer))


def _printed(answer: Mapping[str, Any]) -> str:
    """What a call printed, as text that can be stored; the function can have changed anything in its process."""
    text = answer.get("printed")
    return text[: 2 * MOST].encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _require_form(values: Any, metrics: Any, extra: Any) -> None:
    """Raise ValueError unless the parts of an answer have the form that the worker uses. The function runs in the
    process that answers, and can have changed anything in it."""
    logged = [value for column in metrics.values() for value in column]
    if not all(type(value) in (int, float) for value in logged):
        raise ValueError("a metric is not a number")
    if not all(isinstance(column, list) for column in (values, *extra.values())):
        raise ValueError("not lists")


def _value(value: Any, completion: Completion) -> Value:
    """A value from a worker. Step ends that do not match the completion are a failure."""
    if value is None:
        return None
    if not isinstance(value, dict):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError("not a finite number")
        return float(value)
    if "bad" in value:
        return writable_message(str(value["bad"]))
    rewards, ends = (tuple(value[name]) for name in ("rewards", "ends"))
    if not all(type(reward) in (int, float) for reward in rewards) or not all(type(end) is int for end in ends):
        raise ValueError("not numbers")
    steps, size = Steps(rewards, ends), len(completion.token_ids)
    rising = all(before < after for before, after in pairwise(steps.ends))
    if len(steps.ends) != len(steps.rewards) or not rising or not all(0 <= end < size for end in steps.ends):
        return (
            f"step_ends = {list(steps.ends)[:20]} for {len(steps.rewards)} step_rewards and {size} tokens: must be one "
            "per reward, strictly increasing, and within the completion"
        )
    return steps
