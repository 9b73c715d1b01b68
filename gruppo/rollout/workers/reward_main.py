"""The process that runs reward functions: `python -m gruppo.rollout.workers.reward_main READ_FD WRITE_FD MEMORY_BYTES TRAINER_PID`.

Calls arrive as pickles from the trainer; answers go back as JSON, so that nothing a reward does can make the trainer
unpickle it. Functions run in the main thread, where signals (math-verify's SIGALRM) work. What a reward prints goes
to the file that the trainer gave as this process's output.

What a function leaves behind must not reach the next call: its answer has the number of its message, a child that it
forked ends where it would answer too, its alarms are switched off, and the working directory is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import operator
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction
from gruppo.rewards.loading import Loaded, load_reward
from gruppo.rollout.workers.channel import MOST_BYTES
from gruppo.rollout.workers.limits import serve_pipes

_encode = json.JSONEncoder().encode  # of our own, as functions may patch json


def serve(calls: Connection, answers: Connection) -> None:
    """Load the functions of the first message, then answer calls until the trainer hangs up."""
    rewards: list[Loaded] = []
    own, place = os.getpid(), os.getcwd()
    with asyncio.Runner() as runner:
        for number in count(1):
            try:
                content = calls.recv_bytes()
            except EOFError:
                return
            answer = _answer(content, rewards, runner)
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that comes later would end this process
            if os.getpid() != own:
                os._exit(0)  # a child that a function forked and that came back from it
            with contextlib.suppress(OSError):
                os.chdir(place)
            answers.send_bytes(_as_bytes({**answer, "number": number}))


def _as_bytes(answer: Mapping[str, Any]) -> bytes:
    content = _encode(answer).encode()
    if len(content) <= MOST_BYTES:
        return content
    failure = f"logged {len(content)} bytes by log_metric and log_extra, more than {MOST_BYTES} in one call"
    return _encode({"failure": failure, "number": answer["number"]}).encode()


def _answer(content: bytes, rewards: list[Loaded], runner: asyncio.Runner) -> dict[str, Any]:
    try:
        message = pickle.loads(content)
    except Exception as error:  # noqa: BLE001  a row's column can be an object that this process cannot make
        return {"failure": f"a column of the row cannot be carried into the reward's process ({_describe(error)})"}
    if message["kind"] == "load":
        sys.path += [place for place in message["path"] if place not in sys.path]
        return _load(message["rewards"], message["columns"], rewards)
    return _score(rewards[message["function"]], message["arguments"], message["state"], runner)


def _load(rewards: Sequence[tuple[Any, ...]], columns: Sequence[str], loaded: list[Loaded]) -> dict[str, Any]:
    """Rewards as (import path or pickle, name, options); the answer is {"digests": a hash of each one's code} or
    {"error": why}."""
    for source, name, options in rewards:
        try:
            loaded.append(load_reward(source, name, options, columns))
        except UsageError as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001  unpickling runs the user's code
            return {
                "error": f"reward: cannot be carried into its process ({type(error).__name__}: {error}); "
                "define it in a file and name it by import path"
            }
    return {"digests": [each.digest for each in loaded]}


def _score(
    reward: Loaded, arguments: Mapping[str, Any], state: Mapping[str, Any], runner: asyncio.Runner
) -> dict[str, Any]:
    """{"values": […], "metrics": …, "extra": …} or {"failure": why} (with "last" where this process is of no more use);
    a value is a number, None, {"bad": text}, or of steps {"rewards": …, "ends": …}."""
    size = len(arguments["completions"])  # before the call, which can change its arguments
    metrics: dict[str, list[float]] = {}
    extra: dict[str, Any] = {}

    def log_metric(name: str, value: float) -> None:
        metrics.setdefault(str(name), []).append(float(value))

    def log_extra(column: str, values: Sequence[Any]) -> None:
        extra[str(column)] = [_plain(value) for value in values]

    run = {"trainer_state": SimpleNamespace(**state), "log_extra": log_extra, "log_metric": log_metric}
    try:
        result = reward.function(**_accepted(reward.function, {**arguments, **run, **reward.options}))
        if inspect.isawaitable(result):
            result = runner.run(_awaited(result))
        values = _values(result, size)
    except MemoryError as error:  # what filled the memory may be held for ever: another process goes on
        return {"failure": f"{_describe(error)} (see reward.memory)", "last": True}
    except BaseException as error:  # noqa: BLE001  all of it is an abstention
        return {"failure": _describe(error)}
    return {"values": values, "metrics": metrics, "extra": extra}


def _accepted(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
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


def _values(result: Any, size: int) -> list[Any]:
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
    if isinstance(value, str | bytes | bytearray | memoryview):  # of which float() would take some
        return {"bad": f"returned {_shown(value[:40])}, not a number"}
    if isinstance(value, Exception):  # how a function tells the failure of one completion
        return {"bad": _describe(value)}
    try:
        number = float(value)
    except Exception as error:  # noqa: BLE001  a user's object can raise anything here
        return {"bad": f"returned a value that is no number ({_describe(error)})"}
    return number if abs(number) < float("inf") else {"bad": f"returned {number}"}


def _steps(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rewards of steps as {"rewards": …, "ends": …}; whether they fit the completion is for the trainer to see."""
    if set(value) != {"step_rewards", "step_ends"}:
        names = ", ".join(_plain(key) for key in islice(value, 4))
        return {"bad": f"returned a mapping of {names or 'nothing'}, not of step_rewards and step_ends"}
    try:
        rewards = [float(each) for each in value["step_rewards"]]
        ends = [operator.index(each) for each in value["step_ends"]]
    except Exception as error:  # noqa: BLE001  a user's object can raise anything here
        return {"bad": f"returned step_rewards or step_ends that are no lists of numbers ({_describe(error)})"}
    if odd := [each for each in rewards if not abs(each) < float("inf")]:
        return {"bad": f"returned a step reward of {odd[0]}"}
    return {"rewards": rewards, "ends": ends}


def _shown(value: Any) -> str:
    return _plain(bytes(value) if isinstance(value, bytearray | memoryview) else value, repr)


def _plain(value: Any, form: Callable[[Any], str] = str) -> str:
    try:
        return form(value)
    except BaseException:  # noqa: BLE001  a user's object can refuse to be printed in any way
        return f"<{type(value).__name__} that cannot be printed>"


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "gruppo/rollout/workers/reward_main" not in frame.filename.replace("\\", "/")]
    where = f" (line {own[-1].lineno} of {own[-1].filename})" if own else ""
    return f"{type(error).__name__}: {_plain(error)[:300]}{where}"


if __name__ == "__main__":
    serve_pipes(serve)
