"""Worker processes that are forked from one that has imported what they need: a start takes a fraction of the time.

`prestarted_workers()` puts a `Start` for subprocess.Popen in gruppo.rollout.workers.supervised, for the processes of
rewards and of environments. Supervisor and worker are processes of their own as usual, and run the usual code; only
Python's start and the imports are saved. Tests of the processes themselves (tests/rollout/workers, tests/rewards) start
them as a run does.

    python tests/prestarted.py SOCKET_FD

Each request forks a parent for the supervisor, which reports how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from gruppo.rollout.environments import worker_main
from gruppo.rollout.workers import reward_main, supervisor

MODULES = {reward_main.__name__, worker_main.__name__}  # that workers run
MOST = 1 << 20  # bytes of a request
ABOVE = 500  # descriptors from here on are free
PATH = os.environ.get("PYTHONPATH")  # Python reads it when it starts


class Start:
    """What a supervisor needs of subprocess.Popen."""

    def __init__(
        self,
        server: socket.socket,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        pass_fds: Sequence[int],
        cwd: str | None,
        start_new_session: bool,
        env: Mapping[str, str],
    ) -> None:
        assert stdin == subprocess.DEVNULL
        assert stdout == stderr
        assert start_new_session
        self.returncode: int | None = None
        self._ended, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = command[command.index(supervisor.__file__) + 1 :]
        request = {"arguments": arguments, "cwd": cwd or os.getcwd(), "env": dict(env), "passed": list(pass_fds)}
        with open(os.devnull, "r+b") as nothing, theirs:
            output = nothing.fileno() if stdout == subprocess.DEVNULL else stdout
            socket.send_fds(server, [json.dumps(request).encode()], [theirs.fileno(), output, *pass_fds])
        self.pid = int(self._ended.recv(64))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self._take()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("supervisor", timeout or 0)
            self._take()
        return self.returncode

    def _take(self) -> None:
        self.returncode = int(self._ended.recv(64))
        self._ended.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@cache
def _server() -> socket.socket:
    """The connection to the process that forks the workers of this process; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-u", "-X", "faulthandler", "-P", __file__, str(theirs.fileno())]
    with theirs:
        subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    return ours


@contextlib.contextmanager
def prestarted_workers() -> Iterator[None]:
    """Within the block, the worker processes of this process are forked; on Linux."""
    if sys.platform != "linux":
        yield
        return

    def start(command: Sequence[str], **options: Any) -> Any:
        if not MODULES.isdisjoint(command) and options["env"].get("PYTHONPATH") == PATH:
            return Start(server, command, **options)
        return subprocess.Popen(command, **options)

    server = _server()
    stand_in = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    with mock.patch("gruppo.rollout.workers.supervised.subprocess", stand_in):
        yield


def serve(requests: socket.socket) -> None:
    """Fork for each request, until the tests end."""
    while True:
        content, descriptors, _, _ = socket.recv_fds(requests, MOST, 16)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG if content else 0)[0]:
                pass
        if not content:
            return
        if os.fork() == 0:
            requests.close()
            _watch(json.loads(content), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Fork the supervisor, and say its number, and how it ended."""
    parent, child = os.getpid(), os.fork()
    if child == 0:
        try:
            _supervise(request, descriptors[1:], parent)
        finally:
            os._exit(1)
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    os.write(descriptors[0], b"%d" % child)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # the tests have ended
        os.write(descriptors[0], b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _supervise(request: Mapping[str, Any], descriptors: Sequence[int], parent: int) -> None:
    """Run the supervisor in this process, with the descriptors, environment and folder that it is started with."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    wanted = {
        0: nothing,
        1: descriptors[0],
        2: descriptors[0],
        **dict(zip(request["passed"], descriptors[1:], strict=True)),
    }
    moved = {number: os.dup2(descriptor, ABOVE + number) for number, descriptor in wanted.items()}
    os.closerange(3, ABOVE)
    for number, descriptor in moved.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.execv = _run  # type: ignore[assignment]  # by the supervisor, for the worker
    control, _, *others = request["arguments"]
    sys.argv = [supervisor.__file__, control, str(parent), *others]
    supervisor.main()


def _run(_: str, command: Sequence[str]) -> NoReturn:
    """Run the worker in this process, as the code in its command does: see `python_command`."""
    sys.path.append(command[command.index("-c") + 2])
    _, _, module, *arguments = command[command.index("-c") + 1 :]
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # runpy would warn, in the log of the rewards
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
