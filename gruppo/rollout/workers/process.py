"""A worker process: starting it, calling it and ending it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gruppo.rollout.workers.channel import Channel
from gruppo.rollout.workers.limits import clean_environment, withheld
from gruppo.rollout.workers.log import Output
from gruppo.rollout.workers.supervised import Supervised

# Runs a module of gruppo as a program. Unlike with -m, the current folder is no source of modules: a file json.py in it
# would replace Python's. The folder that contains gruppo may be one that only the trainer has in its path.
_START = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
_PACKAGES = str(Path(__file__).parents[3])


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of gruppo as a program, in this Python and with unbuffered output."""
    return [sys.executable, "-u", "-X", "faulthandler", "-P", "-c", _START, _PACKAGES, module, *arguments]


LOAD_TIMEOUT = 300.0  # seconds
TICK_SECONDS = 0.5


class Worker:
    """A process that runs user-defined code, and the pipes to it.

    `module`: the module it runs. `field`, `limit`, `log`, `doing`, `advice`: recipe fields, log file, what loading is
    called, and what may make it faster, for error messages.
    """

    module = "gruppo.rollout.workers.reward_main"
    field, limit, log = "reward.functions", "reward.timeout", "rewards.log"
    doing = "loading the functions"
    advice = "do less at import, and download a reward model before the run: hf download NAME"
    variables: Mapping[str, str] = MappingProxyType({})  # environment variables that override the trainer's

    def __init__(
        self, load: bytes, output: Output | None, memory: int, environment: Sequence[str], delay: float = 0.0
    ) -> None:
        """Start the process after `delay` seconds and send it the load message."""
        self._environment = {**clean_environment(environment), **self.variables}
        call_read, call_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self.channel = Channel(answer_read, call_write)
        printed = subprocess.DEVNULL if output is None else output.descriptor
        command = python_command(self.module, *(str(number) for number in (call_read, answer_write, memory)))
        try:
            self.process = Supervised(command, (call_read, answer_write), printed, self._environment, delay=delay)
        except BaseException:
            self.channel.close()
            raise
        finally:
            os.close(call_read)
            os.close(answer_write)
        self.dead = self.loaded = self.timed_out = False
        self.load_answer: Mapping[str, Any] = {}  # its answer to the load message
        self.load_by = time.monotonic() + delay + LOAD_TIMEOUT
        self.tries = 1  # to load the code, this one included
        self._sent = 0
        self.send(load)

    def send(self, message: bytes) -> None:
        """Start to send a message. Only one message may be pending at a time."""
        self._sent += 1
        self.channel.send(message)

    def answer_by(self, deadline: float) -> dict[str, Any] | None:
        """The answer if it has arrived, a failure if the process is gone or the deadline has passed, else None."""
        self.channel.flush()
        try:
            content = self.channel.receive()
        except EOFError:
            return self._died()
        except ValueError:
            return self._invalid_answer()
        if content is not None:
            return self._receive(content)
        if time.monotonic() < deadline:
            return None
        self.kill()
        self.timed_out = True
        why = f"took longer than {self.limit} allows" if self.loaded else f"it takes longer than {LOAD_TIMEOUT:.0f} s"
        return {"failure": why}

    def _receive(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            return self._invalid_answer()
        if not isinstance(answer, dict) or answer.pop("number", None) != self._sent:
            return self._invalid_answer()
        if answer.pop("last", False):
            self.kill()
        for key in ("failure", "error"):
            if key in answer:
                answer[key] = self._with_hint(writable_message(str(answer[key])))
        return answer

    def _with_hint(self, text: str) -> str:
        """The text, with advice if it mentions an environment variable that the process did not get."""
        if names := withheld(self._environment, text):
            return f'{text} ({names[0]} is not passed to worker processes; write reward.environment = ["{names[0]}"])'
        return text

    def _died(self) -> dict[str, Any]:
        code = self.process.exit_code()
        self.kill()
        return {"failure": f"its process died ({how_it_ended(code)}); see {self.log}"}

    def _invalid_answer(self) -> dict[str, Any]:
        self.kill()
        return {"failure": "its process wrote something other than an answer to the trainer's pipe and was killed"}

    def accept(self, answer: Mapping[str, Any]) -> None:
        """Take the answer to the load message: the process is ready for calls."""
        self.loaded, self.load_answer = True, answer

    def kill(self) -> None:
        """Kill the process and everything it has started."""
        if self.dead:
            return
        self.dead = True
        self.process.end()
        self.channel.close()


def wait(workers: Iterable[Worker], seconds: float) -> None:
    """Wait at most `seconds` until one of the workers has data to read or can take more of a pending message."""
    poll = select.poll()
    for worker in workers:
        poll.register(worker.channel.read, select.POLLIN)
        if worker.channel.waits_to_write:
            poll.register(worker.channel.write, select.POLLOUT)
    poll.poll(seconds * 1000)


def kill(workers: Sequence[Worker]) -> None:
    """Kill the workers, all at the same time."""
    for worker in workers:
        worker.process.ask_to_end()
    for worker in workers:
        worker.kill()


def how_it_ended(code: int | None) -> str:
    """How a process ended, as text."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def writable_message(text: str) -> str:
    """The text without lone surrogates, which cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()
