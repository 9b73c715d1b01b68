"""The program inside the sandbox: runs blocks of code in one namespace, one after another.

It has the standard library alone and trusts nobody's code to leave it whole: what counts for others (time, memory of
the trainer, length of the output) is limited from outside. Frames, both ways, begin with the 16 bytes that the pool
drew for the block:

    calls:    16 bytes, length of the code (4 bytes), code
    answers:  16 bytes, outcome (1 byte), length of the report (2 bytes), report

A report is the frames of an error, a null byte, and what the error says.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import io
import linecache
import math
import os
import resource
import signal
import struct
import sys
import traceback
import types
from collections.abc import Mapping

CALL, ANSWER = struct.Struct("=16sI"), struct.Struct("=16sBH")
OK, ERROR, MEMORY = range(3)
READY = bytes(16)  # what the first answer, to no call, begins with
MOST_FRAMES, MOST_SAID, MOST_LINE = 4000, 8000, 240  # characters of a report's two parts, and of a line of frames
FRAMES = 8  # of a traceback, the last ones
CUT = "\n[output cut here]\n"
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_STACK = 8 * 2**20
_SIGNALS = 16  # that wait, of the user's in all
_BLOCK = "<block "
_read, _write, _look, _process = os.read, os.write, os.fstat, os.getpid  # of our own, as blocks may patch os


class Output(io.RawIOBase):
    """Standard output and error: so many bytes a block, and what is more is dropped here, at no cost to the pool."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        with memoryview(data) as given, given.cast("B") as view:
            part = bytes(view[: self.left])
            self.left -= len(part)
            while part:
                part = part[_write(1, part) :]
            return len(view)


class Interpreter:
    """The namespace and what has to be put right again after a block."""

    def __init__(self, most_output: int) -> None:
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        self.output = Output(most_output)
        self.streams = [_stream(self.output), _stream(self.output)]
        self.blocks = 0

    def run(self, code: bytes) -> tuple[int, str]:
        """The outcome of a block and the report of its error, "" where there is none."""
        self.blocks += 1
        self.output.left = self.output.most
        self.streams = [_stream(self.output) if each.closed else each for each in self.streams]
        sys.stdout, sys.stderr = self.streams
        reserve = bytearray()
        try:
            reserve = bytearray(2**20)  # to report with, where memory is at its end
            outcome, report = self._execute(code), ""
        except MemoryError as error:
            del reserve
            outcome, report = MEMORY, _where(error)
        except SystemExit as error:
            outcome, report = _exited(error)
        except BaseException as error:  # noqa: BLE001  all of it is the block's
            outcome, report = ERROR, _report(error)
        for each in self.streams:
            with contextlib.suppress(ValueError, OSError):  # closed by the block
                each.flush()
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        return outcome, report

    def _execute(self, code: bytes) -> int:
        """Run a block; the value of an expression that ends it is shown."""
        name, text = f"{_BLOCK}{self.blocks}>", code.decode("utf-8", "surrogatepass")
        linecache.cache[name] = len(text), None, [f"{line}\n" for line in text.splitlines()], name
        tree, last = ast.parse(text, name), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        space = self.module.__dict__
        exec(compile(tree, name, "exec", dont_inherit=True), space)
        if last is not None:
            value = eval(compile(last, name, "eval", dont_inherit=True), space)
            if value is not None:
                space["_"] = value
                self.streams[0].write(f"{value!r}\n")
        return OK


def _stream(output: Output) -> io.TextIOWrapper:
    return io.TextIOWrapper(output, "utf-8", "backslashreplace", line_buffering=True)  # type: ignore[arg-type]


def _exited(error: SystemExit) -> tuple[int, str]:
    """sys.exit ends the block, as its author meant, and not the session."""
    if error.code is None or (isinstance(error.code, int) and error.code == 0):
        return OK, ""
    return ERROR, _report(error)


def _where(error: BaseException) -> str:
    """An error and its line, in as little memory as can be."""
    frame, line = error.__traceback__, 0
    while frame is not None:
        if frame.tb_frame.f_code.co_filename.startswith(_BLOCK):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{type(error).__name__} (line {line} of the block)" if line else type(error).__name__


def _report(error: BaseException) -> str:
    """The traceback from the block's own first frame on, of bounded length."""
    frames = error.__traceback__
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith(_BLOCK):
        frames = frames.tb_next
    try:
        parts = traceback.format_exception_only(type(error), error)
        above = next((place for place, part in enumerate(parts) if part[:1] != " "), 0)  # of no valid Python, its line
        said = "".join(parts[above:])
        text = "".join(traceback.format_exception(type(error), error, frames, limit=-FRAMES))
        if not text.endswith(said):  # a group of errors, which is told as a tree
            said = text
        text = text.removesuffix(said)
    except BaseException:  # noqa: BLE001  a block's own exception can refuse to be printed in any way
        return f"{type(error).__name__} that cannot be printed"
    lines = [line if len(line) <= MOST_LINE else f"{line[:MOST_LINE]}...\n" for line in text.splitlines(True)]
    told = "".join(lines)[-MOST_FRAMES:]
    return "\0".join((told.replace("\0", "\\x00"), _begun(said)))


def _begun(said: str) -> str:
    """As much of what an error says as a report has room for."""
    return said if len(said) <= MOST_SAID else said[:MOST_SAID] + CUT


def confine(limits: Mapping[str, float], needed: bool) -> None:
    """Lower the limits of this process for good. Where they are not `needed`, one that the system lacks is left out."""
    wanted = {
        "RLIMIT_AS": limits["memory"],
        "RLIMIT_FSIZE": limits["file_size"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_STACK": _STACK,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_SIGPENDING": _SIGNALS,
    }
    for name, most in wanted.items():
        try:
            what = getattr(resource, name)
            _, hard = resource.getrlimit(what)
            lowered = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
            resource.setrlimit(what, (lowered, lowered))
        except (AttributeError, OSError, ValueError):
            if needed:
                raise


def filter_calls(program: bytes) -> None:
    """Put a filter of system calls on this process for good. Raises OSError where the kernel refuses."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    library, zero = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
    given = Program(len(program) // 8, program)
    done = library.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or library.prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(given), zero, zero
    )
    if done:
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")


def allow_processor(seconds: float) -> None:
    """Let the system end this process some time after the pool should have done so. The code of a block could undo
    this; the pool's own clock it cannot reach."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, hard))


def serve(calls: int, answers: int, interpreter: Interpreter, processor_seconds: float) -> None:
    """Run blocks until the pool hangs up, or memory is at its end; 0 seconds leave processor time to the pool alone."""
    own, output = _process(), _file(1)
    _send(answers, ANSWER.pack(READY, OK, 0))
    while begin := _receive(calls, CALL.size):
        mark, length = CALL.unpack(begin)
        if processor_seconds:
            allow_processor(processor_seconds)
        outcome, text = interpreter.run(_receive(calls, length))
        if _process() != own:
            os._exit(0)  # a child that a block forked, without a sandbox, and that came back from it
        if _file(1) != output:  # closed or another's by the block: nothing could be shown any more
            return
        report = text.encode("utf-8", "backslashreplace")[:60000]
        _send(answers, ANSWER.pack(mark, outcome, len(report)) + report)
        if outcome == MEMORY:  # what filled it may be held for ever
            return


def _file(descriptor: int) -> tuple[int, int] | None:
    """What a descriptor stands for; None where it is closed."""
    try:
        found = _look(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _receive(descriptor: int, size: int) -> bytes:
    """So many bytes, or b"" where the pool has hung up."""
    parts = []
    while size:
        part = _read(descriptor, min(size, 2**20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(descriptor: int, data: bytes) -> None:
    while data:
        data = data[_write(descriptor, data) :]


def main() -> None:
    """Serve with the setup on the command line, a dict as Python writes it."""
    setup = ast.literal_eval(sys.argv[1])
    limits, calls, answers = setup["limits"], setup["calls"], setup["answers"]
    sys.argv, sys.path[:0] = [""], [""]
    sys.path += setup["path"]
    for name in set(os.environ) - {"HOME", "LANG", "PATH"} - set(setup["environment"]):
        del os.environ[name]
    if setup["parent"] and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != setup["parent"]:  # it died before this process could ask to die with it
            return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # of the module site, which is not loaded
    for each in setup["close"]:  # what bubblewrap itself was given
        with contextlib.suppress(OSError):
            os.close(each)
    interpreter = Interpreter(4 * limits["output"] + 4)
    confine(limits, needed=bool(setup["filter"]))
    if setup["filter"]:
        filter_calls(bytes.fromhex(setup["filter"]))
    # To the first process of a namespace, which the sandbox has, the system sends no such signal.
    serve(calls, answers, interpreter, 0.0 if setup["filter"] else limits["processor_seconds"])


if __name__ == "__main__":
    main()
