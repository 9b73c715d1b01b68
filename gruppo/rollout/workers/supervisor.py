"""The parent of a worker process, which ends everything that the process has started:

    python supervisor.py CONTROL_FD TRAINER_PID MARK DELAY PASSED_FDS COMMAND...

On Linux it adopts orphans (PR_SET_CHILD_SUBREAPER). Every process that the command starts, directly or not, in
whatever session and with whatever environment, therefore stays one of its descendants. They are killed when the command
ends, when the trainer asks for it through the socket CONTROL_FD, and when the trainer dies. If the supervisor itself is
killed, the command dies with it (PR_SET_PDEATHSIG).

Other systems have neither call. There, descendants are the processes that have MARK in their environment, and those
whose parents are descendants.

The command starts after DELAY seconds, with the descriptors PASSED_FDS (numbers with commas between them). The
supervisor writes the command's process id and a line break to the socket. When nothing is left, it writes the most
memory that the command held, in bytes, a line break, and DONE; it ends as the command did. It uses only the standard
library, except for psutil where there is no /proc, and nothing of gruppo, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

MARK = "GRUPPO_REWARD_PROCESS"  # environment variable with the mark
DONE = b"."
_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_SECONDS = 0.5  # until the next look at the trainer: a process that it forked can keep its end of the socket open
_LONGEST_PAUSE = 0.1
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Supervisor:
    """Starts the command, waits until it has to end, and ends it with all its descendants."""

    def __init__(self, control: int, trainer: int, mark: str) -> None:
        self.control, self.trainer, self.mark = control, trainer, mark
        self.worker: int | None = None
        self.status: int | None = None  # of the command, as returned by wait4, once it has ended
        self.peak = 0  # bytes of memory
        os.set_inheritable(control, False)
        self._woken, wakes = os.pipe()
        for descriptor in (self._woken, wakes):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        if _LINUX:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def run(self, delay: float, passed: list[int], command: list[str]) -> None:
        """Start the command after the delay, and return when it and all its descendants have ended."""
        start = time.monotonic() + delay
        while (left := start - time.monotonic()) > 0:
            if self._asked_to_end(left):
                return
        self.worker = _start(command)
        for descriptor in passed:  # so that the command's pipes close when it ends
            os.close(descriptor)
        with contextlib.suppress(OSError):  # the trainer is dead
            os.write(self.control, b"%d\n" % self.worker)
        while self._reap() and self.status is None and not self._asked_to_end(_LOOK_SECONDS):
            pass
        self._end()

    def _asked_to_end(self, patience: float) -> bool:
        """Wait at most `patience` seconds for a signal. Returns whether the trainer asks for the end or is dead."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(min(patience, _LOOK_SECONDS) * 1000)]
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        return self.control in ready or os.getppid() != self.trainer

    def _reap(self) -> bool:
        """Wait for the children that have ended. Returns whether there are others."""
        try:
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                if ended[0] == self.worker:
                    self.status, used = ended[1:]
                    self.peak = used.ru_maxrss * (1024 if _LINUX else 1)
        except ChildProcessError:
            return False
        return True

    def _end(self) -> None:
        """Kill until no descendant is left.

        The kernel lets no process fork that is being killed, so every round leaves only processes that were forked
        before it. All processes of a group are killed in one step, which ends those that fork and exit faster than they
        can be found. Processes with the rights of another user cannot be killed; if only those are left, they stay.
        """
        pause, before = 0.001, set[int]()
        while self._reap() or not _LINUX:
            found = descendants(self.mark)
            if not _LINUX and not found:
                break
            killed = [_kill(process, group) for process, group in found.items()]
            if found and not any(killed):
                break
            pause = min(2 * pause, _LONGEST_PAUSE) if set(found) == before else 0.001
            before = set(found)
            time.sleep(pause)
        with contextlib.suppress(OSError):  # the trainer is dead
            os.write(self.control, b"%d\n" % self.peak + DONE)

    def exit(self) -> NoReturn:
        """End as the command did."""
        if self.status is not None and os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            with contextlib.suppress(OSError):  # SIGKILL has no handler
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os._exit(os.waitstatus_to_exitcode(self.status) if self.status is not None else 1)


def _start(command: list[str]) -> int:
    """Start the command in a session of its own, with the default signal handlers. Returns its process id."""
    supervisor = os.getpid()
    worker = os.fork()
    if worker:
        return worker
    try:
        os.setsid()
        if _LINUX:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (*_IGNORED, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if os.getppid() == supervisor:  # otherwise it died before this process could ask to be killed with it
            os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _kill(process: int, group: int) -> bool:
    """Kill a descendant, with its process group. Returns whether it was permitted.

    Descendants are in sessions of their own, so nothing else is in their groups. Process ids are given in turn, so none
    is used again within the moment since it was found.
    """
    if group not in (0, os.getpgrp()):
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True


def descendants(mark: str) -> dict[int, int]:
    """The process groups of all living descendants of this process, by process id; see the module's docstring."""
    found, groups, parents = {os.getpid()}, dict[int, int](), dict[int, int]()
    for process, parent, group, living, with_mark in _processes() if _LINUX else _processes_with_marks(mark):
        parents[process] = parent
        if living:
            groups[process] = group
        if with_mark:
            found.add(process)
    number = 0
    while number != len(found):
        number = len(found)
        found |= {process for process, parent in parents.items() if parent in found}
    return {process: groups[process] for process in found - {os.getpid()} if process in groups}


def _processes() -> Iterator[tuple[int, int, int, bool, bool]]:
    """Of every process: its id, its parent, its process group, whether it lives (is not a zombie), and False."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as stream:  # it may end now
            state, parent, group = stream.read().rpartition(b")")[2].split(maxsplit=3)[:3]
            yield int(name), int(parent), int(group), state not in b"ZX", False


def _processes_with_marks(mark: str) -> Iterator[tuple[int, int, int, bool, bool]]:
    """The same where there is no /proc; the last item is whether the process has the mark."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            parent, living = process.ppid(), process.status() != psutil.STATUS_ZOMBIE
            yield process.pid, parent, os.getpgid(process.pid), living, _has_mark(process.pid, mark)


def _has_mark(process: int, mark: str) -> bool:
    import psutil

    try:
        return bool(psutil.Process(process).environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False


def end_marked(mark: str) -> None:
    """Kill the processes with the mark, for a supervisor that was killed."""
    for _ in range(5):  # a process can start another during the search
        found = [process for process, _, _, living, marked in _processes_with_marks(mark) if living and marked]
        if not found:
            return
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)


def main() -> NoReturn:
    """See the module's docstring."""
    control, trainer, mark, delay, passed, *command = sys.argv[1:]
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    supervisor = Supervisor(int(control), int(trainer), mark)
    supervisor.run(float(delay), [int(number) for number in passed.split(",") if number], command)
    supervisor.exit()


if __name__ == "__main__":
    main()
