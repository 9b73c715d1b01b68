"""The trainer's side of a supervisor (gruppo.rollout.workers.supervisor): starts a program, and ends it with everything
that it has started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex

from gruppo.rollout.workers import supervisor

END_SECONDS = 5.0  # a process that is stuck in a system call ends only when that returns
_PROGRAM = Path(supervisor.__file__)
# No site module (-S), no folder before the standard library (-P), no bytecode (-B).
_OPTIONS = ("-s", "-S", "-P", "-B") if sys.platform == "linux" else ("-P", "-B")


class Supervised:
    """A program under a supervisor. `process` is the supervisor, which ends as the program does, but only when
    everything that the program has started has ended too."""

    def __init__(
        self,
        command: Sequence[str],
        passed: Sequence[int],
        output: int,
        environment: Mapping[str, str],
        folder: str | None = None,
        delay: float = 0.0,
    ) -> None:
        """Start the program after `delay` seconds. `passed`: the descriptors that it gets; `output`: where it prints
        to; `folder`: its working directory, by default the trainer's."""
        self._mark = token_hex(16)
        self._control, theirs = socket.socketpair()
        arguments = (str(theirs.fileno()), str(os.getpid()), self._mark, str(delay), ",".join(map(str, passed)))
        try:
            self.process = subprocess.Popen(
                [sys.executable, *_OPTIONS, str(_PROGRAM), *arguments, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), *passed),
                cwd=folder,
                start_new_session=True,  # Ctrl-C is handled by the trainer
                env={**environment, supervisor.MARK: self._mark},
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._said = b""

    @property
    def gone(self) -> bool:
        """Whether the program and everything that it has started have ended."""
        return self.process.poll() is not None

    def number(self, patience: float) -> int:
        """The program's process id. Raises OSError if it has not started after `patience` seconds."""
        while b"\n" not in self._said:
            if not select.select([self._control], [], [], patience)[0] or not (part := self._control.recv(4096)):
                raise ProcessLookupError("the program has not started")
            self._said += part
        return int(self._said.partition(b"\n")[0])

    def exit_code(self) -> int | None:
        """The program's exit code, or minus the signal that ended it. None if it is unknown within a second."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return self.process.returncode

    @property
    def peak(self) -> int:
        """The most memory that the program held, in bytes, once it has ended; 0 if it is unknown."""
        parts = self._said.split(b"\n")  # its process id, this number, and that nothing is left
        return int(parts[1]) if len(parts) == 3 else 0

    def ask_to_end(self) -> None:
        """Begin to end the program and everything that it has started."""
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGCONT)  # if the program has stopped its supervisor
            self._control.send(b"\n")

    def end(self) -> None:
        """End the program and everything that it has started."""
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        if self.process.returncode is not None and not self._has_ended_all():
            supervisor.end_marked(self._mark)
        self._control.close()

    def _has_ended_all(self) -> bool:
        """Whether the supervisor has reported that nothing is left. It has not if it was killed itself."""
        with contextlib.suppress(OSError):
            while part := self._control.recv(4096):
                self._said += part
        return self._said.endswith(supervisor.DONE)
