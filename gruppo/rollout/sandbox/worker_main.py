"""The program inside the sandbox: runs blocks of code one after another in the same namespace.

It uses only the standard library and does not rely on blocks to leave it intact: everything that affects others (time,
memory of the trainer, length of the output) is limited from outside. Frames in both directions begin with 16 random
bytes that the pool generated for the block:

    calls:    16 bytes, length of the code (4 bytes), code
    answers:  16 bytes, outcome (1 byte), length of the report (2 bytes), report

A report consists of the traceback frames of an error, a null byte, and the message of the error.
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
READY = bytes(16)  # begins the first answer, which belongs to no call
MOST_FRAMES, MOST_SAID, MOST_LINE = 4000, 8000, 240  # characters of a report's two parts, and of a line of the frames
FRAMES = 8  # the last frames of a traceback that are shown
CUT = "\n[output cut here]\n"
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_STACK = 8 * 2**20
_SIGNALS = 16  # pending signals, counted over all of the user's processes
_BLOCK = "<block "
_read, _write, _look, _process = os.read, os.write, os.fstat, os.getpid  # own references, because blocks may patch os


class Output(io.RawIOBase):
    """Standard output and error, at most `most` bytes per block. The rest is dropped here, at no cost to the pool."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        with memoryview(data) as original, original.cast("B") as view:
            part = bytes(view[: self.left])
            self.left -= len(part)
            while part:
                part = part[_write(1, part) :]
            return len(view)


class Interpreter:
    """The namespace of the blocks, and the state that must be restored after a block."""

    def __init__(self, most_output: int) -> None:
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        self.output = Output(most_output)
        self.streams = [_stream(self.output), _stream(self.output)]
        self.blocks = 0

    def run(self, code: bytes) -> tuple[int, str]:
        """Run a block. Returns its outcome and the report of its error, "" without one."""
        self.blocks += 1
        self.output.left = self.output.most
        self.streams = [_stream(self.output) if stream.closed else stream for stream in self.streams]
        sys.stdout, sys.stderr = self.streams
        reserve = bytearray()
        try:
            reserve = bytearray(2**20)  # memory for the report, if the block has used up the rest
            outcome, report = self._execute(code), ""
        except MemoryError as error:
            del reserve
            outcome, report = MEMORY, _where(error)
        except SystemExit as error:
            outcome, report = _exited(error)
        except BaseException as error:  # noqa: BLE001  any exception belongs to the block
            outcome, report = ERROR, _report(error)
        for stream in self.streams:
            with contextlib.suppress(ValueError, OSError):  # closed by the block
                stream.flush()
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        return outcome, report

    def _execute(self, code: bytes) -> int:
        """Run a block. If it ends with an expression, print its value."""
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
    """sys.exit ends the block, as intended, but not the session."""
    if error.code is None or (isinstance(error.code, int) and error.code == 0):
        return OK, ""
    return ERROR, _report(error)


def _where(error: BaseException) -> str:
    """An error and its line, in as little memory as possible."""
    frame, line = error.__traceback__, 0
    while frame is not None:
        if frame.tb_frame.f_code.co_filename.startswith(_BLOCK):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{type(error).__name__} (line {line} of the block)" if line else type(error).__name__


def _report(error: BaseException) -> str:
    """The traceback, from the first frame of the block on, with bounded length."""
    frames = error.__traceback__
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith(_BLOCK):
        frames = frames.tb_next
    try:
        parts = traceback.format_exception_only(type(error), error)
        above = next((place for place, part in enumerate(parts) if part[:1] != " "), 0)  # for a SyntaxError, its line
        message = "".join(parts[above:])
        text = "".join(traceback.format_exception(type(error), error, frames, limit=-FRAMES))
        if not text.endswith(message):  # an exception group, which is printed as a tree
            message = text
        text = text.removesuffix(message)
    except BaseException:  # noqa: BLE001  printing an exception defined by a block can fail in any way
        return f"{type(error).__name__} that cannot be printed"
    lines = [line if len(line) <= MOST_LINE else f"{line[:MOST_LINE]}...\n" for line in text.splitlines(True)]
    shown = "".join(lines)[-MOST_FRAMES:]
    return "\0".join((shown.replace("\0", "\\x00"), _shortened(message)))


def _shortened(message: str) -> str:
    """As much of the message of an error as fits into a report."""
    return message if len(message) <= MOST_SAID else message[:MOST_SAID] + CUT


def confine(limits: Mapping[str, float], needed: bool) -> None:
    """Permanently lower the limits of this process. Unless `needed`, a limit that the system lacks is skipped."""
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
            limit = getattr(resource, name)
            _, hard = resource.getrlimit(limit)
            lowered = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
            resource.setrlimit(limit, (lowered, lowered))
        except (AttributeError, OSError, ValueError):
            if needed:
                raise


def filter_calls(program: bytes) -> None:
    """Permanently install a system call filter in this process. Raises OSError if the kernel refuses it."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    library, zero = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
    content = Program(len(program) // 8, program)
    failed = library.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or library.prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(content), zero, zero
    )
    if failed:
        raise OSError(ctypes.get_errno(), "the kernel refuses the system call filter")


def allow_processor(seconds: float) -> None:
    """Let the system end this process a little later than the pool should have. The code of a block could undo this
    limit, but it cannot affect the pool's own clock."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, hard))


def serve(calls: int, answers: int, interpreter: Interpreter, processor_seconds: float) -> None:
    """Run blocks until the pool closes the pipe or memory runs out. With `processor_seconds` 0, only the pool limits
    processor time."""
    process, output = _process(), _file(1)
    _send(answers, ANSWER.pack(READY, OK, 0))
    while header := _receive(calls, CALL.size):
        mark, length = CALL.unpack(header)
        if processor_seconds:
            allow_processor(processor_seconds)
        outcome, text = interpreter.run(_receive(calls, length))
        if _process() != process:
            os._exit(0)  # without a sandbox: a child that a block forked and that returned from the block
        if _file(1) != output:  # the block closed or replaced it: no output could be shown any more
            return
        report = text.encode("utf-8", "backslashreplace")[:60000]
        _send(answers, ANSWER.pack(mark, outcome, len(report)) + report)
        if outcome == MEMORY:  # the objects that filled it may never be freed
            return


def _file(descriptor: int) -> tuple[int, int] | None:
    """The file behind a descriptor, None if it is closed."""
    try:
        status = _look(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _receive(descriptor: int, size: int) -> bytes:
    """Read `size` bytes. Returns b"" if the pool has closed the pipe."""
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
    """Run blocks, with the setup from the command line, a dict written with repr."""
    setup = ast.literal_eval(sys.argv[1])
    limits, calls, answers = setup["limits"], setup["calls"], setup["answers"]
    sys.argv, sys.path[:0] = [""], [""]
    sys.path += setup["path"]
    for name in set(os.environ) - {"HOME", "LANG", "PATH"} - set(setup["environment"]):
        del os.environ[name]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # normally set by the module site, which is not loaded
    for descriptor in setup["close"]:  # those that bubblewrap itself used
        with contextlib.suppress(OSError):
            os.close(descriptor)
    interpreter = Interpreter(4 * limits["output"] + 4)
    confine(limits, needed=bool(setup["filter"]))
    if setup["filter"]:
        filter_calls(bytes.fromhex(setup["filter"]))
    # The first process of a namespace, as in the sandbox, does not get the signal of this limit.
    serve(calls, answers, interpreter, 0.0 if setup["filter"] else limits["processor_seconds"])


if __name__ == "__main__":
    main()
