"""A worker process: starting it, calling it and ending it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from gruppo.rollout.workers.channel import Channel
from gruppo.rollout.workers.limits import clean_environment, withheld
from gruppo.rollout.workers.log import LogFile, Output, Printer
from gruppo.rollout.workers.supervised import Supervised
from gruppo.utils.last_lines import last_words

# Runs a module of gruppo as a program. Unlike with -m, the current folder is no source of modules: a file json.py in it
# would replace Python's. The folder that contains gruppo may be one that only the trainer has in its path.
_START = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
_PACKAGES = str(Path(__file__).parents[3])


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of gruppo as a program, in this Python and with unbuffered output."""
    return [sys.executable, "-u", "-X", "faulthandler", "-P", "-c", _START, _PACKAGES, module, *arguments]


LOAD_TIMEOUT = 300.0  # seconds
TICK_SECONDS = 0.5
_MUCH = 50 * 10**6  # bytes of memory that may explain a death


@dataclass(frozen=True)
class Order:
    """A process that is to be started: the module that it runs, the limit of its memory in bytes (0 for none), its
    environment variables, after how many seconds it starts, and its working directory, None for that of this
    process."""

    module: str
    memory: int
    environment: Mapping[str, str]
    delay: float
    folder: str | None = None


class Ending(NamedTuple):
    """How a process has ended: its exit code, or minus the signal that ended it; the most memory that it held, 0 if
    that is unknown, and its limit, in bytes; and the last lines that it wrote."""

    code: int | None
    peak: int
    memory: int
    lines: list[str]

    def __str__(self) -> str:
        return f"({how_it_ended(self.code)})"

    @property
    def details(self) -> str:
        """What else may explain it, to be added to a line."""
        parts = []
        if self.peak >= _MUCH:
            limit = f" of {self.memory / 1e9:.1f}" if self.memory else ""
            parts.append(f"; it held up to {self.peak / 1e9:.1f}{limit} GB")
        if words := last_words(self.lines):
            parts.append(f"; its last words: {words}")
        return "".join(parts)


class LostError(Exception):
    """A message that the process has not answered has to be answered by another one: the process is gone, and that is
    not the doing of the message, as far as it is known."""


class Process(Protocol):
    """A process that a worker has, on this machine or another one.

    `gone`: whether it has ended, with everything that it has started. `heard`: the time, of `time.monotonic`, up to
    which all that it has said has arrived here. `began`: the time at which it was started; a machine may not be there
    yet.
    """

    @property
    def gone(self) -> bool: ...

    @property
    def heard(self) -> float: ...

    @property
    def began(self) -> float: ...

    def ask_to_end(self) -> None:
        """Begin to end it, with everything that it has started."""

    def end(self) -> None:
        """End it, with everything that it has started."""

    def ending(self) -> Ending:
        """How it has ended by itself."""


class Messages(Protocol):
    """The connection to a process. `read`: a descriptor that is ready when `receive` may have a message; `write`: one
    that is ready when more of a message can be sent, if it `waits_to_write`."""

    read: int
    write: int

    @property
    def waits_to_write(self) -> bool: ...

    def send(self, message: bytes) -> None:
        """Begin to send a message."""

    def flush(self) -> None:
        """Send more of it."""

    def receive(self) -> bytes | None:
        """The next message, or None while there is none. Raises EOFError if the process is gone, ValueError for invalid
        data, and LostError."""

    def close(self) -> None:
        """End the connection."""


class Launcher(Protocol):
    """Starts worker processes. `machines`: how many they are spread over."""

    machines: int

    def launch(self, place: int, order: Order) -> tuple[Messages, Process]:
        """Start a process. `place`: the number of the worker among all of its pool; machines take turns."""

    def close(self) -> None:
        """Write the rest of what the processes, which have ended, have printed."""


class LocalProcess(Supervised):
    """See `Process`. A process on this machine."""

    began = float("-inf")

    def __init__(self, order: Order, passed: Sequence[int], printer: Printer | None) -> None:
        """`passed`: the descriptors from which it reads messages and to which it writes answers."""
        command = python_command(order.module, *map(str, (*passed, order.memory)))
        printed = subprocess.DEVNULL if printer is None else printer.descriptor
        super().__init__(command, passed, printed, order.environment, order.folder, order.delay)
        self._memory, self._printer = order.memory, printer

    @property
    def heard(self) -> float:
        """See `Process`."""
        return time.monotonic()

    def ending(self) -> Ending:
        """See `Process`."""
        code = self.exit_code()
        self.end()
        return Ending(code, self.peak, self._memory, self._printer.last_lines() if self._printer else [])


def start_process(order: Order, output: Output | None) -> tuple[Channel, LocalProcess]:
    """Start a process on this machine. `output`: where it prints to."""
    call_read, call_write = os.pipe()
    answer_read, answer_write = os.pipe()
    channel = Channel(answer_read, call_write)
    try:
        with output.open() if output is not None else nullcontext() as printer:
            return channel, LocalProcess(order, (call_read, answer_write), printer)
    except BaseException:
        channel.close()
        raise
    finally:
        os.close(call_read)
        os.close(answer_write)


class LocalLauncher:
    """See `Launcher`. Processes on this machine, whose output goes to a file, if there is one."""

    machines = 1

    def __init__(self, log: Path | None) -> None:
        self._output = Output(LogFile(log).append) if log is not None else None

    def launch(self, place: int, order: Order) -> tuple[Channel, LocalProcess]:
        """See `Launcher`."""
        return start_process(order, self._output)

    def close(self) -> None:
        """See `Launcher`."""
        if self._output is not None:
            self._output.close()
            self._output = None


class Worker:
    """A process that runs user-defined code, and the connection to it.

    `module`: the module it runs. `field`, `limit`, `log`, `doing`, `advice`: recipe fields, log file, what loading is
    called, and what may make it faster, for error messages.
    """

    module = "gruppo.rollout.workers.reward_main"
    field, limit, log = "reward.functions", "reward.timeout", "rewards.log"
    doing = "loading the functions"
    advice = "do less at import, and download a reward model before the run: hf download NAME"
    variables: Mapping[str, str] = MappingProxyType({})  # environment variables that override the trainer's

    def __init__(
        self,
        load: bytes,
        launch: Callable[[Order], tuple[Messages, Process]],
        memory: int,
        environment: Sequence[str],
        delay: float = 0.0,
    ) -> None:
        """Start the process after `delay` seconds and send it the load message. `environment`: names of environment
        variables to pass in addition to the usual ones."""
        self._environment = {**clean_environment(environment), **self.variables}
        self.channel, self.process = launch(Order(self.module, memory, self._environment, delay))
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
        except LostError as error:
            self.kill()
            return {"lost": str(error)}
        except EOFError:
            return self._died()
        except ValueError:
            return self._invalid_answer()
        if content is not None:
            return self._receive(content)
        if self.patience(deadline) > 0:
            return None
        self.kill()
        self.timed_out = True
        why = f"took longer than {self.limit} allows" if self.loaded else f"it takes longer than {LOAD_TIMEOUT:.0f} s"
        return {"failure": why}

    def patience(self, deadline: float) -> float:
        """Seconds for which `answer_by` may still wait. Only what the process has said in time counts, so a machine
        that is silent itself is waited for."""
        if not self.loaded:
            deadline = max(deadline, self.process.began + LOAD_TIMEOUT)
        left = deadline - time.monotonic()
        return left if left > 0 or self.process.heard >= deadline else TICK_SECONDS

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
        ending = self.process.ending()
        self.kill()
        return {"failure": f"its process died {ending}; see {self.log}{ending.details}"}

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
