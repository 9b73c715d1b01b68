"""An interpreter process, and one exchange with it: a block is sent, an answer is received.

Every byte from the process is treated as hostile: reads are bounded, and anything except the one expected answer ends
the process. Both clocks are outside the process: wall time of the trainer, and processor time as the system counts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gruppo.errors import RunError
from gruppo.rollout.sandbox import worker_main as worker
from gruppo.rollout.sandbox.bubblewrap import MIB, Limits, confined, does_not_start, unconfined
from gruppo.rollout.sandbox.output import Kept, composed, printable
from gruppo.rollout.sandbox.seccomp import first_filter
from gruppo.rollout.workers.supervised import Supervised

Status = Literal["ok", "error", "time", "memory", "killed"]

START_SECONDS = 60.0
MOST_WRITTEN = 16 * MIB  # bytes that a block may write to the descriptors beyond those that are kept
MOST_FILES = 10_000
LOOK_SECONDS = 0.2
END_SECONDS = 5.0
_CHUNK, _CHUNKS = 2**16, 16  # chunks that are read before the clocks are checked again
_ANSWER_BYTES = worker.ANSWER.size + 2**16


@dataclass(frozen=True)
class Ran:
    """Result of a block.

    `output` is safe to show and never longer than `Limits.output`: the printed text, the value of an expression that
    ends the block, the traceback of an error, and why the block was stopped. `status` is "ok", or "error" for an
    exception. If the interpreter is gone, it is "time" (wall or processor time), "memory" or "killed" (its process
    ended or did something forbidden). `seconds`: wall time, without the wait for an interpreter.
    """

    output: str
    status: Status
    seconds: float


class Exchange:
    """A call to an interpreter and its answer.

    `end` is None until the exchange has ended: "answered", "gone" (the interpreter closed the pipe), "forged" (the data
    received is not a valid answer) or "flooded" (too much output was written).
    """

    def __init__(self, pipes: tuple[int, int, int], mark: bytes, message: bytes, most_output: int) -> None:
        self._calls, self._answers, self._output = pipes
        self._mark, self._outgoing, self._incoming = mark, memoryview(message), bytearray()
        self._output_open = True
        self.kept = Kept(most_output)
        self._most_written = self.kept.most + MOST_WRITTEN
        self.end: Literal["answered", "gone", "forged", "flooded"] | None = None
        self.outcome, self.report = worker.OK, ""

    def step(self, patience: float) -> None:
        """Wait at most `patience` seconds for data, then read and write what is possible."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if self._output_open:
            poll.register(self._output, select.POLLIN)
        if self._outgoing:
            poll.register(self._calls, select.POLLOUT)
        poll.poll(patience * 1000)
        self._send()
        self._receive()  # first, because output printed before an answer can then be read
        while self._read_output() and self.end is not None:
            pass
        if self.kept.written > self._most_written:
            self.end = "flooded"

    def _send(self) -> None:
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(self._calls, self._outgoing[:_CHUNK]) :]
        except BlockingIOError:
            pass
        except OSError:  # the reader is gone: the answer pipe will show it
            self._outgoing = memoryview(b"")

    def _receive(self) -> None:
        try:
            chunk = os.read(self._answers, _ANSWER_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            self.end = "gone"
            return
        self._incoming += chunk
        if len(self._incoming) < worker.ANSWER.size:
            return
        mark, outcome, length = worker.ANSWER.unpack_from(self._incoming)
        report = self._incoming[worker.ANSWER.size :]
        if mark != self._mark or outcome not in (worker.OK, worker.ERROR, worker.MEMORY) or len(report) > length:
            self.end = "forged"
        elif len(report) == length:
            self.end, self.outcome = "answered", outcome
            self.report = "\0".join(printable(part) for part in report.split(b"\0", 1))

    def _read_output(self) -> bool:
        """Read some of the output. Returns whether there may be more."""
        for _ in range(_CHUNKS):
            if self.kept.written > self._most_written or not self._output_open:
                return False
            try:
                chunk = os.read(self._output, _CHUNK)
            except BlockingIOError:
                return False
            self._output_open = bool(chunk)
            self.kept.add(chunk)
        return True


class Process:
    """An interpreter process, confined by bubblewrap. Without it, the process has the user's rights and process limits.

    One thread may close it while another waits for a block.
    """

    def __init__(self, limits: Limits, bubblewrap: str | None, mark: str) -> None:
        self.limits, self._mark = limits, mark
        self._using = threading.Lock()
        self._ready = False
        self._number: int | None = None  # process id of the interpreter, which is not that of bubblewrap
        self._handle: int | None = None
        self._folder: str | None = None
        pairs = _pipes(4)  # calls, answers, output, and information from bubblewrap
        ours = [pairs[0][1], *(read for read, _ in pairs[1:])]
        theirs = [pairs[0][0], *(write for _, write in pairs[1:])]
        self._calls: int | None
        self._calls, self._answers, self._output, self._info = ours
        try:
            self._folder = None if bubblewrap else tempfile.mkdtemp(prefix="gruppo-")
            for descriptor in ours:
                os.set_blocking(descriptor, False)
            self._supervised = None if bubblewrap else self._unconfined(*theirs)
            self._process = self._supervised.process if self._supervised else self._confined(str(bubblewrap), *theirs)
        except BaseException:
            self._release()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def _confined(self, bubblewrap: str, calls: int, answers: int, output: int, info: int) -> subprocess.Popen[bytes]:
        filter_from, filter_to = os.pipe()
        try:
            try:
                os.write(filter_to, first_filter())  # fits into the pipe as a whole
            finally:
                os.close(filter_to)
            command = confined(bubblewrap, self.limits, self._mark, calls, answers, filter_from, info)
            return _spawn(command, output, (calls, answers, filter_from, info), "/", {})
        finally:
            os.close(filter_from)

    def _unconfined(self, calls: int, answers: int, output: int, _: int) -> Supervised:
        command, environment = unconfined(self.limits, self._mark, calls, answers)
        home = str(self._folder)
        return Supervised(command, (calls, answers), output, environment | {"HOME": home}, home)

    def await_ready(self) -> None:
        """Wait until the interpreter is ready for a block. Raises RunError, with its output, if it does not start."""
        with self._using:
            if self._ready:
                return
            exchange = self._exchange(worker.READY, b"")
            deadline = time.monotonic() + START_SECONDS
            while exchange.end is None and time.monotonic() < deadline:
                exchange.step(deadline - time.monotonic())
            if exchange.end != "answered":
                output = printable(exchange.kept.data) if exchange.end else f"no answer in {START_SECONDS:.0f} s"
                raise RunError(does_not_start(output))
            self._find()
            self._ready = True

    def run(self, code: bytes, head: str) -> Ran:
        """Run a block. `head` is put before its output. After a status other than "ok" or "error", only `close` may be
        called."""
        mark = secrets.token_bytes(16)
        with self._using:
            self._signal(signal.SIGCONT)
            start, used = time.monotonic(), self._processor()
            exchange = self._exchange(mark, worker.CALL.pack(mark, len(code)) + code)
            over: tuple[Status, str] | None = None
            while exchange.end is None and over is None:
                left = self.limits.seconds - (time.monotonic() - start)
                processor_left = self.limits.processor_seconds - (self._processor() - used)
                over = self._over(left, processor_left)
                if over is None:
                    exchange.step(min(left, processor_left, LOOK_SECONDS))
            # If the block forged the answer, its code must not go on running unobserved.
            self._signal(signal.SIGSTOP)
            status, note = over or self._ended(exchange)
            text = printable(exchange.kept.data)
            output = composed(head, text, exchange.report, note, self.limits.output)
            return Ran(output, status, time.monotonic() - start)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def _over(self, left: float, processor_left: float) -> tuple[Status, str] | None:
        """Status and note of a block that has exceeded a limit; None if it has not. Arguments: seconds left."""
        if left <= 0:
            return "time", f"[stopped: a block may take {self.limits.seconds:g} s]"
        if processor_left <= 0:
            return "time", f"[stopped: a block may take {self.limits.processor_seconds:g} s of processor time]"
        if self._files() > MOST_FILES:
            return "killed", f"[stopped: no more than {MOST_FILES} files may be made]"
        return None

    def _exchange(self, mark: bytes, message: bytes) -> Exchange:
        if self._calls is None:
            raise ValueError("the pool is closed")
        return Exchange((self._calls, self._answers, self._output), mark, message, self.limits.output)

    def _ended(self, exchange: Exchange) -> tuple[Status, str]:
        """Status and note of an exchange that has ended before a limit was exceeded."""
        if exchange.end == "answered":
            if exchange.outcome == worker.MEMORY:
                return "memory", f"[stopped: an interpreter may hold {self.limits.memory / MIB:g} MiB of memory]"
            return ("ok", "") if exchange.outcome == worker.OK else ("error", "")
        if exchange.end == "forged":
            return "killed", "[stopped: the block wrote where only its interpreter writes]"
        if exchange.end == "flooded":
            return "killed", f"[stopped: the block wrote more than {MOST_WRITTEN // MIB} MiB]"
        return self._died()

    def _died(self) -> tuple[Status, str]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        number = -code if code and code < 0 else (code or 0) - 128  # bubblewrap reports a signal in this form
        try:
            name = signal.Signals(number).name
        except ValueError:
            return "killed", f"[the interpreter ended: {'it hung up' if code is None else f'exit code {code}'}]"
        if name == "SIGXCPU":
            return "time", f"[stopped: a block may take {self.limits.processor_seconds:g} s of processor time]"
        return "killed", f"[the interpreter was killed: {name}]"

    def _find(self) -> None:
        """Get the interpreter's process id and a handle on it, and make it the first process that the system kills if
        memory runs out."""
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError):
            if self._supervised is not None:
                number = self._supervised.number(START_SECONDS)
            else:
                number = int(json.loads(os.read(self._info, _CHUNK))["child-pid"])
            self._number = number
            self._handle = os.pidfd_open(number)
            Path(f"/proc/{number}/oom_score_adj").write_text("1000")

    def _signal(self, number: signal.Signals) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):  # it has ended
                signal.pidfd_send_signal(self._handle, number)

    def _processor(self) -> float:
        """Seconds of processor time so far, 0 if unknown."""
        if self._number is None:
            return 0.0
        try:
            return time.clock_gettime(~self._number << 3 | 2)  # clock_getcpuclockid(3)
        except OSError:  # it is gone: the answer pipe will show it
            return 0.0

    def _files(self) -> int:
        """Number of files in the sandbox (even an empty file takes memory), 0 if unknown."""
        if self._number is None or self._folder is not None:
            return 0
        try:
            status = os.statvfs(f"/proc/{self._number}/root/tmp")
        except OSError:
            return 0
        return status.f_files - status.f_ffree

    def stop(self) -> None:
        """Kill the interpreter, if it has started, and without a sandbox everything that it has started. bubblewrap
        then ends too and leaves no zombie process behind."""
        if self._supervised is not None:
            self._supervised.ask_to_end()
        elif self._handle is not None:
            self._signal(signal.SIGKILL)
        elif self._ready:
            self._process.kill()

    def close(self) -> None:
        """Stop the interpreter and everything it has started. Close the pipes as soon as no thread waits on them."""
        self.stop()
        with self._using:
            if self._calls is None:
                return
            os.close(self._calls)  # ends an interpreter that is still starting
            self._calls = None
            if self._supervised is not None:
                self._supervised.end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # stuck in a system call: it ends only when that returns
                self._process.wait(END_SECONDS)
            self._release()

    def _release(self) -> None:
        handle, self._handle = self._handle, None  # first: its number may be reused once it is closed
        for descriptor in (self._calls, self._answers, self._output, self._info, handle):
            if descriptor is not None:
                os.close(descriptor)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _pipes(number: int) -> list[tuple[int, int]]:
    """Open `number` pipes. If one fails, none stays open."""
    with contextlib.ExitStack() as undo:
        pipes = []
        for _ in range(number):
            pipes.append(os.pipe())
            for descriptor in pipes[-1]:
                undo.callback(os.close, descriptor)
        undo.pop_all()
    return pipes


def _spawn(
    command: list[str], output: int, passed: tuple[int, ...], folder: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=passed,
        cwd=folder,
        env=environment,
        start_new_session=True,  # Ctrl-C is handled by the trainer
    )
