"""A worker process: started, asked, restarted and ended."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gruppo.errors import UsageError
from gruppo.rollout.workers.channel import Channel
from gruppo.rollout.workers.limits import clean_environment, end_descendants, withheld
from gruppo.rollout.workers.log import Output
from gruppo.utils.progress import Advance

LOAD_TIMEOUT = 300.0


TICK_SECONDS = 0.5


class Worker:
    """A process that runs users' code, and the pipes to it. `module`: its program; the others are for errors."""

    module = "gruppo.rollout.workers.reward_main"
    field, limit, log = "reward.functions", "reward.timeout", "rewards.log"
    variables: Mapping[str, str] = MappingProxyType({})  # of its environment, whatever the trainer's has

    def __init__(self, load: bytes, output: Output | None, memory: int, environment: Sequence[str]) -> None:
        self._mark = secrets.token_hex(16)
        self._environment = {**clean_environment(environment, self._mark), **self.variables}
        call_read, call_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self.channel = Channel(answer_read, call_write)
        printed = subprocess.DEVNULL if output is None else output.descriptor
        arguments = [str(each) for each in (call_read, answer_write, memory, os.getpid())]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-m", self.module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(call_read, answer_write),
                start_new_session=True,
                env=self._environment,
            )
        except BaseException:
            self.channel.close()
            raise
        finally:
            os.close(call_read)
            os.close(answer_write)
        self.dead = self.loaded = False
        self.told: dict[str, Any] = {}  # when it was loaded
        self._sent = 0
        self.send(load)

    def send(self, message: bytes) -> None:
        """Begin to send a message, of which there is one at a time."""
        self._sent += 1
        self.channel.send(message)

    def answer_by(self, deadline: float) -> dict[str, Any] | None:
        """The answer that has arrived, a failure where the process is gone or the deadline is past, else None."""
        self.channel.flush()
        try:
            content = self.channel.receive()
        except EOFError:
            return self._died()
        except ValueError:
            return self._nonsense()
        if content is not None:
            return self._receive(content)
        if time.monotonic() < deadline:
            return None
        self.kill()
        return {"failure": f"took longer than its time ({self.limit})"}

    def _receive(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            return self._nonsense()
        if not isinstance(answer, dict) or answer.pop("number", None) != self._sent:
            return self._nonsense()
        if answer.pop("last", False):
            self.kill()
        for key in ("failure", "error"):
            if key in answer:
                answer[key] = self._hinted(writable_message(str(answer[key])))
        return answer

    def _hinted(self, text: str) -> str:
        """The text, with what to do where it names a variable of the environment that the process does not have."""
        if names := withheld(self._environment, text):
            return f'{text} ({names[0]} is not passed on to rewards; write reward.environment = ["{names[0]}"])'
        return text

    def _died(self) -> dict[str, Any]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        code = self.process.returncode
        self.kill()
        return {"failure": f"its process died ({_how(code)}); see {self.log}"}

    def _nonsense(self) -> dict[str, Any]:
        self.kill()
        return {"failure": "its process wrote into the pipe to the trainer what is no answer, and was killed"}

    def load(self, show: Advance) -> list[str]:
        """Wait until the functions are loaded; a hash of each one's code. Raises UsageError where they cannot be."""
        deadline = time.monotonic() + LOAD_TIMEOUT
        while (answer := self.answer_by(deadline)) is None:
            wait([self], TICK_SECONDS)
            show(0)
        if "digests" in answer:
            self.loaded, self.told = True, answer
            digests: list[str] = answer["digests"]
            show(1)
            return digests
        if time.monotonic() >= deadline:
            raise UsageError(
                f"{self.field}: loading them takes longer than {LOAD_TIMEOUT:.0f} s; do less at import, and "
                "download a reward model before the run: hf download NAME"
            )
        raise UsageError(str(answer.get("error") or f"{self.field}: while importing them, {answer['failure']}"))

    def kill(self) -> None:
        """Kill the process and whatever it has started."""
        if self.dead:
            return
        self.dead = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        end_descendants(self._mark)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the system: nothing ends it but its own return
            self.process.wait(5)
        self.channel.close()


def wait(workers: Iterable[Worker], seconds: float) -> None:
    """Until one of the workers has something to read, or takes more of what is written to it; at most so long."""
    poll = select.poll()
    for worker in workers:
        poll.register(worker.channel.read, select.POLLIN)
        if worker.channel.waits_to_write:
            poll.register(worker.channel.write, select.POLLOUT)
    poll.poll(seconds * 1000)


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def reload_problem(answer: Mapping[str, Any]) -> str:
    """Why a replaced reward process cannot go on with the functions that the run began with."""
    why = answer.get("error") or answer.get("failure") or "its code has changed since the run began"
    return f"a reward process was replaced, and its functions could not be loaded again ({why}); mend them and resume"


def writable_message(text: str) -> str:
    """Text that UTF-8 files can hold: lone surrogates replaced."""
    return text.encode("utf-8", "replace").decode()
