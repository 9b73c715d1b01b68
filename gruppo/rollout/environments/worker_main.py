"""The worker process of a user-defined environment class.

It is started like a reward process (gruppo.rollout.workers.reward_main):

    python -m gruppo.rollout.environments.worker_main READ_FD WRITE_FD MEMORY_BYTES

Every call carries the whole history of its completion. An object that was lost with another process is rebuilt by
giving the same row and the same texts to a new one. Python's random number generators are seeded before each call from
the completion's seed and turn, so that results depend neither on the process that has an object nor on other objects
there.
"""

from __future__ import annotations

import math
import pickle
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gruppo.errors import UsageError
from gruppo.rollout.environments.loading import Loaded, load_environment
from gruppo.rollout.environments.protocol import Environment, Turn
from gruppo.rollout.workers.process_state import ProcessState, seed
from gruppo.rollout.workers.serving import encode, serve_pipes
from gruppo.utils.imports import use_sent_files


@dataclass
class _State:
    """An environment object, how many texts it has received, and its first observation."""

    environment: Environment
    received: int
    first: str | None


class Host:
    """The environment class and its objects, by number of the completion."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.states: dict[int, _State] = {}
        self.process: ProcessState | None = None

    def answer(self, content: bytes) -> dict[str, Any]:
        """Answer a message with plain values. An exception of user code becomes a "failure"."""
        try:
            message = pickle.loads(content)
        except Exception as error:  # noqa: BLE001  a column of the row can be an object that this process cannot create
            return {
                "failure": f"a column of the row cannot be unpickled in the environment's process ({_describe(error)})"
            }
        if message["kind"] == "load":
            answer = self._load(message)
            self.process = ProcessState()
            return answer
        assert self.process is not None
        try:
            return self.process.context().run(self._turn if message["kind"] == "turn" else self._end, message)
        except MemoryError as error:
            return {"failure": f"{_describe(error)} (see environment.memory)", "last": True}
        except BaseException as error:  # noqa: BLE001  any exception ends this completion only
            self.states.pop(message["play"], None)
            return {"failure": _describe(error)}
        finally:
            self.process.restore()

    def _load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        sys.path += [place for place in message["path"] if place not in sys.path]
        use_sent_files(message["files"])
        try:
            self.loaded = load_environment(message["name"], message["options"])
        except UsageError as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001  a user-defined class can raise anything
            return {"error": f'environment.name = "{message["name"]}": cannot be used ({_describe(error)}); fix it'}
        loaded = self.loaded
        description = {"schemas": loaded.schemas, "stop": loaded.stop, "gives_reward": loaded.gives_reward}
        try:
            encode(description)
        except (TypeError, ValueError) as error:
            return {
                "error": f'environment.name = "{message["name"]}": its tool schemas cannot be written as JSON ({error})'
            }
        return {"digests": [loaded.digest], **description}

    def _turn(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Without texts: reset the environment. Otherwise: answer the last text."""
        number, texts = message["play"], message["texts"]
        if not texts:
            return {"observations": _texts(self._reset(message).first)}
        state = self._state(message, len(texts) - 1)
        turn = _step(state, message["seed"], texts[-1])
        return {
            "observations": _texts(turn.observation),
            "done": bool(turn.done),
            "calls": int(turn.calls),
            "errors": int(turn.errors),
            "play": number,
        }

    def _end(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Get the reward, if the class gives one, and release the object."""
        assert self.loaded is not None
        value = None
        if self.loaded.gives_reward:
            state = self._state(message, len(message["texts"]))
            seed(f"{message['seed']}/{state.received + 1}")
            value = _number(state.environment.get_reward())  # type: ignore[attr-defined]
        self.states.pop(message["play"], None)
        return {"reward": value}

    def _state(self, message: Mapping[str, Any], received: int) -> _State:
        """The completion's object after `received` texts, rebuilt if this process does not have it in that state."""
        state = self.states.get(message["play"])
        if state is None or state.received != received:
            state = self._reset(message)
            for text in message["texts"][:received]:
                _step(state, message["seed"], text)
        return state

    def _reset(self, message: Mapping[str, Any]) -> _State:
        assert self.loaded is not None
        seed(f"{message['seed']}/0")
        environment = self.loaded.make()
        self.states[message["play"]] = state = _State(environment, 0, None)
        state.first = environment.reset(message["row"], message["seed"])
        return state


def _step(state: _State, seed_of_play: int, text: str) -> Turn:
    state.received += 1
    seed(f"{seed_of_play}/{state.received}")
    turn = state.environment.step(text)
    if not isinstance(turn, Turn):
        raise TypeError(f"step returned {type(turn).__name__}, not a Turn; write return Turn(observation, done)")
    return turn


def _texts(observation: Any) -> list[str] | None:
    if observation is None:
        return None
    texts = [observation] if isinstance(observation, str) else observation
    if not isinstance(texts, Sequence) or any(not isinstance(text, str) for text in texts):
        raise TypeError(f"an observation is {type(observation).__name__}, not text or None")
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes):
        raise TypeError(f"get_reward returned {value[:40]!r}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"get_reward returned {number}")
    return number


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not _is_gruppo(frame.filename)]
    where = f" (line {users[-1].lineno} of {users[-1].filename})" if users else ""
    try:
        text = str(error)[:300]
    except Exception:  # noqa: BLE001  a user-defined exception can fail to be printed
        text = "its message cannot be printed"
    return f"{type(error).__name__}: {text}{where}"


def _is_gruppo(filename: str) -> bool:
    return filename == __file__ or "gruppo/rollout/environments/" in filename.replace("\\", "/")


if __name__ == "__main__":
    serve_pipes(Host().answer, "its answer has {size} bytes, more than {most}")
