"""Runs reward functions in worker processes, where they can hang, crash or misbehave without affecting the trainer.

One call is one function on one group. A worker runs one call at a time. If a call exceeds the timeout, its process and
everything it started are killed, and the worker is replaced. The time to load functions does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import cloudpickle

from gruppo.config.labels import options_name, split_label
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Reward as RewardSettings
from gruppo.config.units import bytes_of
from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction, RewardRun, check_option_names, reward_path, split_prefix
from gruppo.rollout.workers.process import Launcher, LocalLauncher, Worker, writable_message
from gruppo.rollout.workers.scoring import Scored, Scoring, pickled
from gruppo.rollout.workers.worker_set import WorkerSet
from gruppo.types import Completion, Prompt
from gruppo.utils.cgroups import machine_memory
from gruppo.utils.imports import files_to_send
from gruppo.utils.progress import Advance, NullProgress, Progress


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
    ) -> Scored:
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
        launcher: Launcher | None = None,
    ) -> None:
        """Start the processes and load the functions in them.

        `columns`: columns of the rows other than the prompt; `timeout`: in seconds, per call; `log`: file for the
        output of rewards; `options`: keyword arguments of functions, by their name in `functions`; `memory`: limit of
        each process in bytes, 0 for no limit; `environment`: names of environment variables to pass in addition to the
        usual ones (gruppo.rollout.workers.limits); `partial_columns`: see `load_reward`; `field`: the recipe field that
        names the functions; `cache`: file in which rewards may keep answers of servers. Raises UsageError if a function
        cannot be imported, cannot be created with its options or does not accept the arguments. `launcher`: starts
        `workers` processes on each of its machines, and keeps their output; by default, they are on this machine.
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
        paths = [reward_path(f) for f in functions if isinstance(f, str)]
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
            "files": files_to_send(split_prefix(path)[1] for path in paths) if launcher else {},
        }
        message = pickled(load)
        self._launcher = launcher or LocalLauncher(log)

        def start(place: int, delay: float) -> Worker:
            worker = Worker(message, partial(self._launcher.launch, place), memory, self.environment, delay)
            worker.field = field
            return worker

        try:
            label = "Loading reward functions"
            count = workers * self._launcher.machines
            self._workers = WorkerSet(start, count, label, progress or NullProgress())
        except BaseException:
            self._launcher.close()
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
        self._launcher.close()

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Have `notify` called with the reason when processes are restarted because they failed to load the functions,
        or because of what a function has changed in them."""
        self.notify = self._workers.notify = notify

    def score(
        self,
        groups: Sequence[tuple[Prompt, Sequence[Completion]]],
        state: Mapping[str, Any],
        advance: Advance | None = None,
    ) -> Scored:
        """Score every completion of every group. Returns the rewards and the metrics that the functions logged.

        `state` becomes `trainer_state`. If a call raises, hangs, dies or returns an invalid result, its completions are
        excluded, with the reason; if a value is not a finite number, only its own completion is excluded. `advance` is
        called at least every half second and may raise; busy processes are then replaced.
        """
        with self.begin([prompt for prompt, _ in groups], state) as scoring:
            for place, (_, completions) in enumerate(groups):
                scoring.add(place, completions)
            return scoring.finish(advance)

    def begin(self, prompts: Sequence[Prompt], state: Mapping[str, Any]) -> Scoring:
        """Begin to score the groups of a step, whose completions are added one by one; see `score`."""
        return Scoring(self._workers, self.names, self.weights, self.timeout, prompts, state, self._stale)

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


def memory_per_process(settings: RewardSettings, machine: int | None = None) -> int:
    """Maximum memory of one reward process, in bytes. `machine`: the memory of its machine; of this one by default."""
    return bytes_of(settings.memory, machine_memory() if machine is None else machine) // settings.workers


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
