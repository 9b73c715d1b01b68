"""Finds what a function has left behind in its process that would reach other functions: patched modules, and threads.

Watched are modules of the standard library, of gruppo and of installed packages. What users' own modules keep in their
globals is their own business. Modules may fill caches and import more of themselves, so only these count as patches:

- another value, or none, for a name that stood for something callable, a module, or, in the standard library, a public
  number or text. In an installed package, another value from the same package does not count, nor does one from any
  package for a private name of the standard library, which libraries replace when they are imported;
- a method or property of a class of the standard library or of gruppo that is replaced, added or removed;
- a new name in place of a built-in;
- another module, or none, in sys.modules.

Comparing all of it takes about a millisecond, so it is done only when a process turns to another function.
"""

from __future__ import annotations

import builtins
import sys
import sysconfig
import threading
from _thread import _count as thread_count
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import is_
from types import FrameType, ModuleType
from typing import Any

_STANDARD, _PACKAGES = sysconfig.get_path("stdlib"), ("site-packages", "dist-packages")
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8  # flags of classes
_LEFT_OUT = ("__main__", "builtins")  # built-ins are restored after every call
_BUILT_INS = frozenset(vars(builtins))
_MISSING = object()


@dataclass
class _Names:
    """The names of a module or a class and their values when they were last looked at. `root`: the package, for an
    installed one."""

    label: str
    space: Mapping[str, Any]
    root: str
    of_class: bool = False
    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()

    def remember(self) -> None:
        self.names, self.values = tuple(self.space), tuple(self.space.values())

    def patched(self) -> str:
        """Description of a patch, or "". Other changes are remembered."""
        now = tuple(self.space.values())
        if len(now) == len(self.values) and all(map(is_, now, self.values)):
            return ""
        before = dict(zip(self.names, self.values, strict=True))
        for name in [*before, *(name for name in self.space if name not in before)]:
            old, new = before.get(name, _MISSING), self.space.get(name, _MISSING)
            if old is not new and self._counts(name, old, new):
                return f"{self.label}.{name}"
        self.remember()
        return ""

    def _counts(self, name: str, old: Any, new: Any) -> bool:
        if old is _MISSING:
            return _is_method(new) if self.of_class else name in _BUILT_INS and not isinstance(new, ModuleType)
        if self.root or name.startswith("_"):  # packages fill their own modules, and patch private names of others
            home = _home(new)
            if home and home == (self.root or home):
                return False
        constant = not self.root and not name.startswith("_") and type(old) in (int, float, complex, str, bytes)
        return constant or _is_method(old) or isinstance(old, ModuleType)


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, property | classmethod | staticmethod)


class ModuleWatch:
    """The modules and threads of this process. Create it when the code is loaded."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}
        self._watched: list[_Names] = []
        self._threads, self._count = set(threading.enumerate()), thread_count()
        self._look_at_new_modules()

    def changed(self) -> str:
        """Description of what has been left behind, or ""."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is not module:
                return f"sys.modules[{name!r}]"
        for names in self._watched:
            if patch := names.patched():
                return patch
        return self._look_at_new_modules() or self._thread()

    def _look_at_new_modules(self) -> str:
        """Watch the modules imported since the last time. Returns a description of a module that stands in for one of
        the standard library, or of a function of the user's in a module, or ""."""
        first = not self._modules
        for name, module in [*sys.modules.items()]:
            if name in self._modules or name in _LEFT_OUT:
                continue
            root = _package(name, module)
            if root is None:
                known = _root(name) in sys.stdlib_module_names and (isinstance(module, ModuleType) or "." not in name)
                if known and not first:
                    return f"sys.modules[{name!r}]"
                continue
            self._modules[name] = module
            watched = [_Names(name, vars(module), root), *(_classes(name, module) if not root else ())]
            for names in watched:
                names.remember()
                if not first and (patch := _foreign(names)):
                    return patch
            self._watched += watched
        return ""

    def _thread(self) -> str:
        if thread_count() <= self._count:
            return ""
        known = {thread.ident: thread for thread in threading.enumerate()}  # without those that _thread has started
        for number, frame in sys._current_frames().items():
            thread = known.get(number)
            if thread not in self._threads and not _serves(thread, frame):
                return f"a running thread ({thread.name if thread else number})"
        return ""


def _home(value: Any) -> str | None:
    """The installed package that a value comes from; None for the user's code and the standard library's.

    For a function, its global names count, because functools.wraps copies the name of a module.
    """
    name = getattr(value, "__globals__", {}).get("__name__") or str(getattr(value, "__module__", None))
    return _package(name, sys.modules.get(name)) or None


def _package(name: str, module: Any) -> str | None:
    """ "" for a module of the standard library or of gruppo, the package of an installed one, None for the user's."""
    root, origin = _root(name), getattr(getattr(module, "__spec__", None), "origin", None)
    if not isinstance(module, ModuleType):
        return None
    if root == "gruppo" or origin in ("built-in", "frozen"):
        return ""
    if not isinstance(origin, str):
        return None
    if any(part in origin for part in _PACKAGES):
        return root
    return "" if origin.startswith(_STANDARD) else None


def _classes(name: str, module: ModuleType) -> Iterator[_Names]:
    for value in [*vars(module).values()]:
        if isinstance(value, type) and value.__module__ == name and value.__flags__ & (_HEAP | _IMMUTABLE) == _HEAP:
            yield _Names(f"{name}.{value.__qualname__}", vars(value), "", of_class=True)


def _foreign(names: _Names) -> str:
    """A function of the user's own modules in a module that was imported by a call, and so was never seen before."""
    for name, value in names.space.items():
        home = sys.modules.get(getattr(value, "__module__", None) or "")
        if callable(value) and home is not None and _package(home.__name__, home) is None:
            return f"{names.label}.{name}"
    return ""


def _root(name: Any) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""


def _serves(thread: threading.Thread | None, frame: FrameType | None) -> bool:
    """Whether a thread belongs to a library and runs none of the user's code: it waits for work in a pool, for example.

    A timer waits in the library too, but will run the user's code.
    """
    if isinstance(thread, threading.Timer):
        return False
    depth = 0
    while frame is not None:
        depth += frame.f_code.co_filename != threading.__file__
        module = sys.modules.get(frame.f_globals.get("__name__", ""))
        if module is None or _package(module.__name__, module) is None:
            return False
        frame = frame.f_back
    return depth > 0
