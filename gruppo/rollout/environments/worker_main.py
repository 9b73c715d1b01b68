"""The process that holds objects of an environment's class: `python -m gruppo.rollout.environments.worker_main READ_FD WRITE_FD MEMORY_BYTES
TRAINER_PID`, as a reward's process (gruppo.rollout.workers.reward_main).

Every call brings the whole history of its completion, so that an object that was lost with another process is made
again by giving the same row and the same texts to a new one. Python's own random numbers are seeded before each call by
the completion's seed and turn: nothing depends on which process holds an object, or on what other objects do there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from gruppo.errors import UsageError
from gruppo.rollout.environments.loading import Loaded, load_environment
from gruppo.rollout.environments.protocol import Environment, Turn
from gruppo.rollout.workers.channel import MOST_BYTES
from gruppo.rollout.workers.limits import serve_pipes

_encode = json.JSONEncoder().encode


@dataclass
class _Held:
    """An object, how many texts it has been given, and what it said when it was reset."""

    made: Environment
    given: int
    first: str | None


class Host:
    """The class, and its objects by the number of their completion."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.held: dict[int, _Held] = {}

    def answer(self, content: bytes) -> dict[str, Any]:
        """The answer to a message, as plain values. What a user's code raises is a "failure"."""
        try:
            message = pickle.loads(content)
        except Exception as error:  # noqa: BLE001  a row's column can be an object that this process cannot make
            return {"failure": f"a column of the row cannot be carried into the environment's process ({_told(error)})"}
        if message["kind"] == "load":
            return self._load(message)
        try:
            return self._turn(message) if message["kind"] == "turn" else self._end(message)
        except MemoryError as error:
            return {"failure": f"{_told(error)} (see environment.memory)", "last": True}
        except BaseException as error:  # noqa: BLE001  all of it ends this completion and no other
            self.held.pop(message["play"], None)
            return {"failure": _told(error)}

    def _load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        sys.path += [place for place in message["path"] if place not in sys.path]
        try:
            self.loaded = load_environment(message["name"], message["options"])
        except UsageError as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001  whatever is odd about a user's class
            return {"error": f'environment.name = "{message["name"]}": cannot be used ({_told(error)}); mend it'}
        found = self.loaded
        told = {"schemas": found.schemas, "stop": found.stop, "gives_reward": found.gives_reward}
        try:
            _encode(told)
        except (TypeError, ValueError) as error:
            return {"error": f'environment.name = "{message["name"]}": its tools have no JSON schema ({error})'}
        return {"digests": [found.digest], **told}

    def _turn(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """With no text: what reset says; else the answer to the last one."""
        number, texts = message["play"], message["texts"]
        if not texts:
            return {"observations": _texts(self._begin(message).first)}
        held = self._held(message, len(texts) - 1)
        turn = _stepped(held, message["seed"], texts[-1])
        return {
            "observations": _texts(turn.observation),
            "done": bool(turn.done),
            "calls": int(turn.calls),
            "errors": int(turn.errors),
            "play": number,
        }

    def _end(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reward, where the class gives one; the object is let go."""
        assert self.loaded is not None
        value = None
        if self.loaded.gives_reward:
            held = self._held(message, len(message["texts"]))
            _seed(message["seed"], held.given + 1)
            value = _number(held.made.get_reward())  # type: ignore[attr-defined]
        self.held.pop(message["play"], None)
        return {"reward": value}

    def _held(self, message: Mapping[str, Any], given: int) -> _Held:
        """The completion's object after so many texts; made again where this process has not got it so."""
        held = self.held.get(message["play"])
        if held is None or held.given != given:
            held = self._begin(message)
            for text in message["texts"][:given]:
                _stepped(held, message["seed"], text)
        return held

    def _begin(self, message: Mapping[str, Any]) -> _Held:
        assert self.loaded is not None
        _seed(message["seed"], 0)
        made = self.loaded.make()
        self.held[message["play"]] = held = _Held(made, 0, None)
        held.first = made.reset(message["row"], message["seed"])
        return held


def _stepped(held: _Held, seed: int, text: str) -> Turn:
    held.given += 1
    _seed(seed, held.given)
    turn = held.made.step(text)
    if not isinstance(turn, Turn):
        raise TypeError(f"step returned {type(turn).__name__}, not a Turn; write return Turn(observation, done)")
    return turn


def _seed(seed: int, turn: int) -> None:
    """Seed the generators that a user's code may draw from without asking."""
    random.seed(f"{seed}/{turn}")
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.Random(f"{seed}/{turn}/numpy").getrandbits(32))


def _texts(observation: Any) -> list[str] | None:
    if observation is None:
        return None
    texts = [observation] if isinstance(observation, str) else observation
    if not isinstance(texts, Sequence) or any(not isinstance(each, str) for each in texts):
        raise TypeError(f"an observation is {type(observation).__name__}, not text or None")
    return [each.encode("utf-8", "replace").decode() for each in texts]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes):
        raise TypeError(f"get_reward returned {value[:40]!r}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"get_reward returned {number}")
    return number


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _ours(frame.filename)]
    where = f" (line {own[-1].lineno} of {own[-1].filename})" if own else ""
    try:
        text = str(error)[:300]
    except Exception:  # noqa: BLE001  an exception of a user's can refuse to be printed
        text = "it cannot be printed"
    return f"{type(error).__name__}: {text}{where}"


def _ours(filename: str) -> bool:
    return filename == __file__ or "gruppo/rollout/environments/" in filename.replace("\\", "/")


def serve(calls: Connection, answers: Connection) -> None:
    """Answer messages until the trainer hangs up."""
    host, own, place = Host(), os.getpid(), os.getcwd()
    for number in count(1):
        try:
            content = calls.recv_bytes()
        except EOFError:
            return
        answer = host.answer(content)
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that comes later would end this process
        if os.getpid() != own:
            os._exit(0)  # a child that the class forked and that came back from it
        with contextlib.suppress(OSError):
            os.chdir(place)
        made = _encode({**answer, "number": number}).encode()
        if len(made) > MOST_BYTES:
            made = _encode({"failure": f"an answer of {len(made)} bytes", "number": number}).encode()
        answers.send_bytes(made)


if __name__ == "__main__":
    serve_pipes(serve)
