"""What a call of user-defined code changes in its process: restored after the call, if that is possible.

The state that counts is that after the code was loaded: what it changes at import is kept.
"""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import ctypes
import faulthandler
import gc
import io
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from _signal import getsignal  # type: ignore[import-not-found]  # without signal's conversion to enums, which takes most of the time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

_SIGNALS = tuple(sorted(set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}))
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_LIMITS = tuple(sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}))
_OF_SYS = (
    "argv", "breakpointhook", "displayhook", "dont_write_bytecode", "excepthook", "modules", "path", "stderr", "stdin",
    "stdout", "unraisablehook",
)  # fmt: skip
_POINTER = ctypes.sizeof(ctypes.c_void_p)


@dataclass
class _Setting:
    """A part of the state: how it is read and written, and its value after the code was loaded."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    value: Any = None


class ProcessState:
    """The state of this process. Create it when the code is loaded."""

    def __init__(self) -> None:
        self.damage = ""  # what could not be restored
        self._environment = _Environment()
        self._output = {number: os.dup(number) for number in (0, 1, 2)}
        self._context = contextvars.copy_context()
        self._settings = [_Setting(*one) for one in _settings(self._output)]
        for setting in self._settings:
            setting.value = setting.read()

    def context(self) -> contextvars.Context:
        """A context for a call: what the call sets in context variables, also numpy's and decimal's, is lost after
        it."""
        context = self._context.copy()
        decimal = sys.modules.get("decimal")
        if decimal is not None:  # the context of decimal numbers is changed in place
            context.run(lambda: decimal.setcontext(decimal.getcontext().copy()))
        return context

    def restore(self) -> None:
        """Restore the state after a call."""
        try:
            for timer in _TIMERS:  # a later alarm would end this process
                _setitimer(timer, 0)
            _cancel_dump()
            self._environment.restore()
        except Exception:  # noqa: BLE001  the call can have broken anything
            self.damage = self.damage or "environment variables"
        for setting in self._settings:
            try:
                if setting.read() != setting.value:
                    setting.write(setting.value)
                    if setting.read() != setting.value:
                        raise ValueError("not restored")
            except Exception:  # noqa: BLE001  the call can have broken anything
                self.damage = self.damage or setting.name


_setitimer, _cancel_dump = signal.setitimer, faulthandler.cancel_dump_traceback_later


def seed(text: str) -> None:
    """Seed the global generators that user code may use: Python's, and numpy's and torch's if they are loaded."""
    random.seed(text)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.Random(f"{text}/numpy").getrandbits(32))
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(random.Random(f"{text}/torch").getrandbits(63))


def _settings(output: dict[int, int]) -> list[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """Name, reader and writer of every part."""
    root, lists = logging.root, {name: getattr(sys, name) for name in ("path", "argv")}
    parts: list[tuple[str, Callable[[], Any], Callable[[Any], object]]] = [
        ("built-ins", lambda: dict(vars(builtins)), _write_built_ins),
        ("the working directory", os.getcwd, os.chdir),
        ("the umask", _umask, os.umask),
        ("the locale", lambda: locale.setlocale(locale.LC_ALL, None), lambda one: locale.setlocale(locale.LC_ALL, one)),
        ("the time zone", lambda: (time.tzname, time.timezone, time.altzone), lambda _: time.tzset()),
        ("signal handlers", lambda: [*map(getsignal, _SIGNALS)], _write_handlers),
        ("the signal mask", lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), _write_mask),
        ("sys", lambda: [sys.__dict__.get(name) for name in _OF_SYS], _write_sys),
        *((f"sys.{name}", one.copy, _list_writer(one)) for name, one in lists.items()),
        *((f"sys.{name}", *_importers(name)) for name in ("meta_path", "path_hooks")),
        (
            "standard output",
            lambda: [*map(_file, output)],
            lambda _: [os.dup2(copy, number) for number, copy in output.items()],
        ),
        (
            "blocking output",
            lambda: [*map(os.get_blocking, output)],
            lambda modes: [*map(os.set_blocking, output, modes)],
        ),
        ("the event loop", _event_loop, _write_event_loop),
        ("the wakeup descriptor", _wakeup_descriptor, signal.set_wakeup_fd),
        ("the folder of temporary files", lambda: tempfile.tempdir, lambda one: setattr(tempfile, "tempdir", one)),
        ("the precision of mpmath", lambda: _mpmath().prec, lambda one: setattr(_mpmath(), "prec", one)),
        ("a trace function", lambda: (sys.gettrace(), sys.getprofile()), _write_tracing),
        ("a thread trace function", _thread_tracing, _write_thread_tracing),
        ("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        ("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
        ("the limit of digits", sys.get_int_max_str_digits, sys.set_int_max_str_digits),
        ("garbage collection", lambda: (gc.isenabled(), gc.get_threshold(), gc.get_debug()), _write_collection),
        ("gc.callbacks", gc.callbacks.copy, _list_writer(gc.callbacks)),
        ("warnings", lambda: (id(warnings.filters), [*warnings.filters]), _warnings_writer()),
        ("logging", _read_logging, lambda one: _write_logging(root, one)),
        ("the time limit of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout),
        ("the stack size of threads", threading.stack_size, threading.stack_size),
        ("resource limits", lambda: [*map(resource.getrlimit, _LIMITS)], _write_limits),
        ("the priority", lambda: os.getpriority(os.PRIO_PROCESS, 0), _write_priority),
        ("the user", lambda: (os.getuid(), os.geteuid(), os.getgid(), os.getegid()), _refuse),
        ("the fault handler", faulthandler.is_enabled, lambda _: faulthandler.enable()),
    ]
    if hasattr(os, "sched_getaffinity"):
        parts.append(("the processors", lambda: os.sched_getaffinity(0), lambda one: os.sched_setaffinity(0, one)))
    return parts


class _Environment:
    """Environment variables: os.environ, and the C library's, which programs and libraries get."""

    def __init__(self) -> None:
        self.mapping, self.saved = os.environ, dict(os.environ)
        try:
            self._pointer = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ")
        except ValueError:  # macOS
            self._pointer = ctypes.c_void_p()
        self._state = self._read()

    def _read(self) -> tuple[Any, bytes, Any]:
        """Something that differs after every change of a variable: the C library stores its text elsewhere."""
        start = self._pointer.value
        strings = ctypes.string_at(start, (len(self.saved) + 1) * _POINTER) if start else b""
        return start, strings, dict(self.mapping._data)  # type: ignore[attr-defined]

    def restore(self) -> None:
        os.environ = self.mapping  # noqa: B003  this object, which modules refer to
        if self._read() == self._state:
            return
        start, number, present = self._pointer.value, 0, set(self.mapping)
        while start and (place := ctypes.c_void_p.from_address(start + number * _POINTER).value):
            present.add(os.fsdecode(ctypes.string_at(place).partition(b"=")[0]))
            number += 1
        for name in present - set(self.saved):
            self.mapping.pop(name, None)
            with contextlib.suppress(OSError):
                os.unsetenv(name)
        self.mapping.update(self.saved)
        self._state = self._read()


def _importers(name: str) -> tuple[Callable[[], list[Any]], Callable[[list[Any]], None]]:
    """Reader and writer of the importers that were in this list of sys. Those that libraries add stay."""
    saved = list(getattr(sys, name))

    def present() -> list[Any]:
        return [one for one in saved if one in getattr(sys, name)]

    def write(content: list[Any]) -> None:
        current = getattr(sys, name)
        current[:] = content + [one for one in current if one not in content]

    return present, write


def _event_loop() -> tuple[Any, Any, bool]:
    """The policy of event loops, the current event loop, and whether one was set; asyncio may not be loaded yet."""
    policy = getattr(sys.modules.get("asyncio.events"), "_event_loop_policy", None)
    local = getattr(policy, "_local", None)
    return policy, getattr(local, "_loop", None), getattr(local, "_set_called", False)


def _write_event_loop(state: tuple[Any, Any, bool]) -> None:
    policy, loop, was_set = state
    sys.modules["asyncio.events"]._event_loop_policy = policy  # type: ignore[attr-defined]
    if (local := getattr(policy, "_local", None)) is not None:
        local._loop, local._set_called = loop, was_set


def _wakeup_descriptor() -> int:
    number = signal.set_wakeup_fd(-1)
    if number != -1:
        signal.set_wakeup_fd(number)
    return number


def _mpmath() -> Any:
    """The settings of mpmath; its defaults if it is not loaded."""
    return getattr(sys.modules.get("mpmath"), "mp", None) or SimpleNamespace(prec=53)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_handlers(handlers: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        if getsignal(number) != handler and handler is not None:
            signal.signal(number, handler)


def _write_mask(mask: set[Any]) -> None:
    """Signals that are pending because the call has blocked them are dropped: they could end the process."""
    for number in signal.sigpending() - mask - {signal.SIGKILL, signal.SIGSTOP}:
        handler = signal.signal(number, signal.SIG_IGN)
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _write_sys(values: list[Any]) -> None:
    for name, value in zip(_OF_SYS, values, strict=True):
        setattr(sys, name, value)


def _write_built_ins(content: dict[str, Any]) -> None:
    space = vars(builtins)
    space.update(content)
    for name in [name for name in space if name not in content]:
        del space[name]


def _list_writer(one: list[Any]) -> Callable[[list[Any]], None]:
    def write(content: list[Any]) -> None:
        one[:] = content

    return write


def _file(number: int) -> tuple[Any, ...]:
    """The file behind a descriptor, and whether Python's stream for it is open."""
    stream = (sys.stdin, sys.stdout, sys.stderr)[number]
    if stream is not None and stream.closed:
        mode = "r" if number == 0 else "w"
        fresh = io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=True)
        setattr(sys, ("stdin", "stdout", "stderr")[number], fresh)
    try:
        status = os.fstat(number)
    except OSError:
        return ()
    return status.st_dev, status.st_ino


def _write_tracing(functions: tuple[Any, Any]) -> None:
    sys.settrace(functions[0])
    sys.setprofile(functions[1])


def _thread_tracing() -> tuple[Any, Any]:
    return threading.gettrace(), threading.getprofile()


def _write_thread_tracing(functions: tuple[Any, Any]) -> None:
    threading.settrace(functions[0])
    threading.setprofile(functions[1])


def _write_collection(state: tuple[bool, tuple[int, int, int], int]) -> None:
    enabled, threshold, debug = state
    (gc.enable if enabled else gc.disable)()
    gc.set_threshold(*threshold)
    gc.set_debug(debug)


def _warnings_writer() -> Callable[[tuple[int, list[Any]]], None]:
    filters = warnings.filters

    def write(state: tuple[int, list[Any]]) -> None:
        filters[:] = state[1]  # type: ignore[index]
        warnings.filters = filters
        mutated = getattr(warnings, "_filters_mutated_lock_held", None) or warnings._filters_mutated  # type: ignore[attr-defined]
        with getattr(warnings, "_lock", contextlib.nullcontext()):
            mutated()

    return write


def _read_logging() -> tuple[Any, ...]:
    root = logging.root
    captures = getattr(logging, "_warnings_showwarning", None) is not None
    return root.level, [*root.handlers], [*root.filters], root.disabled, root.manager.disable, captures


def _write_logging(root: logging.Logger, state: tuple[Any, ...]) -> None:
    level, root.handlers[:], root.filters[:], root.disabled, disable, captures = state
    root.setLevel(level)
    logging.disable(disable)
    logging.captureWarnings(captures)


def _write_limits(limits: list[tuple[int, int]]) -> None:
    """A hard limit that was lowered stays, unless the user may raise it."""
    for number, limit in zip(_LIMITS, limits, strict=True):
        if resource.getrlimit(number) != limit:
            resource.setrlimit(number, limit)


def _write_priority(priority: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, priority)


def _refuse(_: Any) -> None:
    raise PermissionError
