"""The worker process that runs reward functions:

    python -m gruppo.rollout.workers.reward_main READ_FD WRITE_FD MEMORY_BYTES

Calls arrive from the trainer as pickles. Answers are sent back as JSON, so that no reward can make the trainer unpickle
anything. Functions run in the main thread, where signals (math-verify's SIGALRM) work. The output of a reward goes to
the file that the trainer passed as the output of this process.

Side effects of a function must not affect other calls. Each answer has the number of its message, and a forked child
ends before it could answer as well. Each call begins with random generators that are seeded by the call, and what it
changes in the process is restored after it (gruppo.rollout.workers.process_state). Before a call of another function
than the last one, the process looks for what it could not restore (gruppo.rollout.workers.module_watch). If it finds
something, it answers {"stale": what} instead, and another process has to run the call.
"""

from __future__ import annotations

import contextvars
import inspect
import operator
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction
from gruppo.rewards.loading import Loaded, load_reward
from gruppo.rollout.workers.module_watch import ModuleWatch
from gruppo.rollout.workers.printed import Printed
from gruppo.rollout.workers.process_state import ProcessState, seed
from gruppo.rollout.workers.serving import serve_pipes
from gruppo.utils.imports import use_sent_files
from gruppo.utils.paths import is_dir

if TYPE_CHECKING:
    import asyncio


class _EventLoop:
    """The event loop of asynchronous functions: one for the process, since clients and locks belong to their loop. It
    is not the current event loop of other functions; a new one follows if a function closes it. asyncio is loaded for
    the first of them: most functions do without."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, result: Any) -> Any:
        """The value of an awaitable."""
        import asyncio

        if self._runner is None or self._runner.get_loop().is_closed():
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        return self._runner.run(_awaited(result), context=contextvars.copy_context())


class _Host:
    """The functions, and the state of the process after they were loaded."""

    def __init__(self) -> None:
        self.loop, self.printed, self.rewards = _EventLoop(), Printed(), list[Loaded]()
        self.state: ProcessState | None = None
        self.watch: ModuleWatch | None = None
        self.last: int | None = None  # the function that was called last

    def answer(self, content: bytes) -> dict[str, Any]:
        """Answer a message."""
        try:
            message = pickle.loads(content)
        except Exception as error:  # noqa: BLE001  a column of the row can be an object that this process cannot create
            return {
                "failure": f"a column of the row cannot be unpickled in the reward's process ({describe_error(error)})"
            }
        if message["kind"] == "load":
            sys.path += [place for place in message["path"] if place not in sys.path]
            use_sent_files(message["files"])
            answer = _load(message["rewards"], message["columns"], message["partial_columns"], self.rewards)
            self.state = ProcessState()
            self.watch = ModuleWatch() if len(self.rewards) > 1 else None
            return answer
        assert self.state is not None
        function = message["function"]
        turns = self.last not in (None, function)
        if turns and self.watch and (stale := self.state.damage or self.watch.changed()):
            return {"stale": stale, "of": self.last, "last": True}
        self.last = function
        seed(message["seed"])
        self.printed.take()
        try:
            run = self.state.context().run
            answer = run(_score, self.rewards[function], message["arguments"], message["state"], self.loop)
        finally:
            self.state.restore()
        return {**answer, "printed": self.printed.take()}


def _load(
    rewards: Sequence[tuple[Any, ...]], columns: Sequence[str], partial_columns: Mapping[str, str], loaded: list[Loaded]
) -> dict[str, Any]:
    """Load rewards given as (import path or pickle, name, options, run). Returns {"digests": hash of each one's code}
    or {"error": why}."""
    for source, name, options, run in rewards:
        if run.cache is not None and not is_dir(run.cache.parent):  # the run folder, from another machine
            run = replace(run, cache=None)  # noqa: PLW2901
        try:
            loaded.append(load_reward(source, name, options, columns, partial_columns, run))
        except UsageError as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001  unpickling runs the user's code
            return {
                "error": f"reward: cannot be unpickled in its process ({type(error).__name__}: {error}); "
                "define it in a file and use its import path"
            }
    return {"digests": [reward.digest for reward in loaded]}


def _score(reward: Loaded, arguments: Mapping[str, Any], state: Mapping[str, Any], loop: _EventLoop) -> dict[str, Any]:
    """Call a reward. Returns {"values": […], "metrics": …, "extra": …} or {"failure": why}, with "last" if this process
    cannot be used any more.

    A value is a number, None, {"bad": text}, or for step rewards {"rewards": …, "ends": …}.
    """
    size = len(arguments["completions"])  # measured before the call, which can change its arguments
    metrics: dict[str, list[float]] = {}
    extra: dict[str, Any] = {}

    def log_metric(name: str, value: float) -> None:
        metrics.setdefault(str(name), []).append(float(value))

    def log_extra(column: str, values: Sequence[Any]) -> None:
        extra[str(column)] = [_plain(value) for value in values]

    run = {"trainer_state": SimpleNamespace(**state), "log_extra": log_extra, "log_metric": log_metric}
    try:
        result = reward.function(**accepted(reward.function, {**arguments, **run, **reward.options}))
        if inspect.isawaitable(result):
            result = loop.run(result)
        values = values_of(result, size)
    except MemoryError as error:  # the memory may never be freed: another process continues
        return {"failure": f"{describe_error(error)} (see reward.memory)", "last": True}
    except BaseException as error:  # noqa: BLE001  any exception means that the reward failed
        return {"failure": describe_error(error)}
    return {"values": values, "metrics": metrics, "extra": extra}


def accepted(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments on offer that a function takes: all, if it has no signature or takes **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return dict(offered)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in offered.items() if name in names}


async def _awaited(result: Any) -> Any:
    return await result


def values_of(result: Any, size: int) -> list[Any]:
    """What a function returned, as JSON (see `_score`). Raises TypeError or ValueError unless there are `size`."""
    if hasattr(result, "tolist"):  # arrays and tensors
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping | set | frozenset) or not hasattr(result, "__iter__"):
        raise TypeError(f"returned {_plain(result)[:100]}, not a list of {size} numbers")
    values = list(islice(result, size + 1))
    if len(values) != size:
        number = len(values) if len(values) < size else "more"
        raise ValueError(f"returned {number} values for {size} completions")
    return [_number(value) for value in values]


def _number(value: Any) -> float | dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return _steps(value)
    if isinstance(value, str | bytes | bytearray | memoryview):  # float() would accept some of them
        return {"bad": f"returned {_shown(value[:40])}, not a number"}
    if isinstance(value, Exception):  # how a function reports a failure on one completion
        return {"bad": describe_error(value)}
    try:
        number = float(value)
    except Exception as error:  # noqa: BLE001  a user-defined object can raise anything here
        return {"bad": f"returned a value that is not a number ({describe_error(error)})"}
    return number if abs(number) < float("inf") else {"bad": f"returned {number}"}


def _steps(value: Mapping[str, Any]) -> dict[str, Any]:
    """Step rewards as {"rewards": …, "ends": …}. The trainer checks whether they match the completion."""
    if set(value) != {"step_rewards", "step_ends"}:
        names = ", ".join(_plain(key) for key in islice(value, 4))
        return {"bad": f"returned a mapping of {names or 'nothing'}, not of step_rewards and step_ends"}
    try:
        rewards = [float(reward) for reward in value["step_rewards"]]
        ends = [operator.index(end) for end in value["step_ends"]]
    except Exception as error:  # noqa: BLE001  a user-defined object can raise anything here
        return {"bad": f"returned step_rewards or step_ends that are not lists of numbers ({describe_error(error)})"}
    if invalid := [reward for reward in rewards if not abs(reward) < float("inf")]:
        return {"bad": f"returned a step reward of {invalid[0]}"}
    return {"rewards": rewards, "ends": ends}


def _shown(value: Any) -> str:
    return _plain(bytes(value) if isinstance(value, bytearray | memoryview) else value, repr)


def _plain(value: Any, form: Callable[[Any], str] = str) -> str:
    try:
        return form(value)
    except BaseException:  # noqa: BLE001  printing a user-defined object can fail in any way
        return f"<{type(value).__name__} that cannot be printed>"


def describe_error(error: BaseException) -> str:
    """An error of a user's function in one line, with the line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if "gruppo/rollout/workers/reward_main" not in frame.filename.replace("\\", "/")]
    where = f" (line {users[-1].lineno} of {users[-1].filename})" if users else ""
    return f"{type(error).__name__}: {_plain(error)[:300]}{where}"


if __name__ == "__main__":
    serve_pipes(_Host().answer, "logged {size} bytes with log_metric and log_extra, more than {most} in one call")
