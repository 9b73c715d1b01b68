"""The process of one reward host: an actor of Ray. It ends with the run; all it holds can be made again."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gruppo.actors.process import Hello
from gruppo.config.sections import Environment
from gruppo.errors import RunError, UsageError
from gruppo.rollout.sandbox.interpreter import Ran
from gruppo.rollout.sandbox.pool import PythonPool, Session
from gruppo.rollout.workers.channel import Channel
from gruppo.rollout.workers.limits import environment_here
from gruppo.rollout.workers.log import Output
from gruppo.rollout.workers.process import Ending, LocalProcess, Order, start_process
from gruppo.utils.cgroups import Memory, machine_memory

MOST_PRINTED = 2**20  # bytes of output that wait for the driver; processes that print more wait, too


class Answered(NamedTuple):
    """A message of a process."""

    number: int
    content: bytes


class Invalid(NamedTuple):
    """A process has written something other than a message."""

    number: int


class Ended(NamedTuple):
    """A process has ended by itself. `received`: how many messages it had been sent before."""

    number: int
    ending: Ending
    received: int


class Printed(NamedTuple):
    """Output of the processes of a pool."""

    pool: int
    chunk: bytes


class News(NamedTuple):
    """What has happened since the last news. `last`: the host is closed, and there will be no more."""

    items: list[Answered | Invalid | Ended | Printed]
    memory: Memory
    last: bool


class Host(NamedTuple):
    """A host as it greets the driver. `memory`: of its machine, in bytes."""

    hello: Hello
    memory: int


class Block(NamedTuple):
    """The result of a block in a sandbox, or why it could not run."""

    ran: Ran | None
    why: str


@dataclass
class _Running:
    channel: Channel
    process: LocalProcess
    received: int = 0


class HostActor:
    """Methods that the driver calls: `news` and those of sandboxes in threads of their own, others one at a time."""

    def __init__(self, beat: float) -> None:
        """`beat`: seconds after which `news` answers in any case."""
        self._beat = beat
        self._woken, self._wakes = os.pipe()
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)
        self._changed = threading.Condition()  # held while anything below is read or changed
        self._running: dict[int, _Running] = {}
        self._ending: list[_Running] = []  # asked to end
        self._outputs: dict[int, Output] = {}  # by pool
        self._failed: list[Ended] = []
        self._printed: deque[Printed] = deque()
        self._waiting = 0  # bytes in it
        self._closed = False
        self._opening = threading.Lock()  # of the sandboxes
        self._sandboxes: PythonPool | None = None
        self._sessions: dict[int, Session] = {}

    def hello(self) -> Host:
        """Who this is."""
        return Host(Hello.of_this_process(), machine_memory())

    # Processes.

    def launch(self, number: int, pool: int, order: Order) -> None:
        """Start a process. The folder of the run is its own, if this machine has it."""
        if pool not in self._outputs:
            self._outputs[pool] = Output(partial(self._keep, pool))
        folder = order.folder if order.folder and Path(order.folder).is_dir() else None
        here = replace(order, environment=environment_here(order.environment), folder=folder)
        try:
            started = _Running(*start_process(here, self._outputs[pool]))
        except OSError as error:
            with self._changed:
                self._failed.append(Ended(number, Ending(None, 0, 0, [str(error)]), 1))
        else:
            with self._changed:
                self._running[number] = started
        self._wake()

    def send(self, number: int, message: bytes) -> None:
        """Send a message to a process. One that is gone does not get it, except for the first: it fails to load."""
        with self._changed:
            one = self._running.get(number)
            if one is not None and not (one.received and one.process.gone):
                one.received += 1
                one.channel.send(message)
        self._wake()

    def end(self, number: int) -> None:
        """End a process, with everything that it has started."""
        with self._changed:
            if one := self._running.pop(number, None):
                one.process.ask_to_end()
                self._ending.append(one)
        self._wake()

    def close(self) -> None:
        """End all processes and sandboxes."""
        with self._changed:
            left = [*self._running.values(), *self._ending]
            self._running, self._ending = {}, []
        for one in left:
            one.process.ask_to_end()
        for one in left:
            one.process.end()
        if self._sandboxes is not None:
            self._sandboxes.close()
        for output in self._outputs.values():
            output.close()
        with self._changed:
            self._closed = True
        self._wake()

    def news(self) -> News:
        """Wait for news, at most for a beat."""
        until = time.monotonic() + self._beat
        while True:
            self._wait(until)
            with self._changed:
                items = self._take()
                last = self._closed and not items
            if items or last or time.monotonic() >= until:
                return News(items, Memory.now(), last)

    def _wait(self, until: float) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        with self._changed:
            for one in self._running.values():
                poll.register(one.channel.read, select.POLLIN)
                if one.channel.waits_to_write:
                    poll.register(one.channel.write, select.POLLOUT)
        poll.poll(max(0.0, until - time.monotonic()) * 1000)
        with suppress(BlockingIOError):
            os.read(self._woken, 4096)

    def _take(self) -> list[Answered | Invalid | Ended | Printed]:
        items: list[Answered | Invalid | Ended | Printed] = [*self._failed]
        self._failed.clear()
        for number, one in list(self._running.items()):
            one.channel.flush()
            try:
                while (content := one.channel.receive()) is not None:
                    items.append(Answered(number, content))
            except EOFError:
                items.append(Ended(number, one.process.ending(), one.received))
                self._forget(number)
            except ValueError:
                items.append(Invalid(number))
                one.process.end()
                self._forget(number)
        for one in [one for one in self._ending if one.process.gone]:
            one.process.end()
            one.channel.close()
            self._ending.remove(one)
        items += self._printed
        self._printed.clear()
        self._waiting = 0
        self._changed.notify_all()
        return items

    def _forget(self, number: int) -> None:
        self._running.pop(number).channel.close()

    def _keep(self, pool: int, chunk: bytes) -> None:
        """Take output. Called by the threads that read it."""
        with self._changed:
            while self._waiting > MOST_PRINTED:
                self._changed.wait()
            self._printed.append(Printed(pool, chunk))
            self._waiting += len(chunk)
        self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wakes, b".")

    # Sandboxes.

    def open_sandboxes(self, settings: Environment) -> str:
        """Start interpreters for model-written code. Returns why that is not possible."""
        try:
            self._pool(settings)
        except UsageError as error:
            return str(error)
        return ""

    def run_block(self, settings: Environment, session: int, code: str) -> Block:
        """Run a block in a session, which begins with its first block."""
        try:
            pool = self._pool(settings)
            return Block(self._sessions.setdefault(session, pool.session()).run(code), "")
        except (RunError, UsageError) as error:
            return Block(None, str(error))

    def end_session(self, session: int) -> None:
        """End a session."""
        if one := self._sessions.pop(session, None):
            one.close()

    def _pool(self, settings: Environment) -> PythonPool:
        from gruppo.rollout.environments.client import python_pool

        with self._opening:
            if self._sandboxes is None:
                self._sandboxes = python_pool(settings)
            return self._sandboxes
