"""Identity of reward functions: hashes of their code, by which a resumed run notices that a function has changed."""

from __future__ import annotations

import copyreg
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from gruppo.rewards.interop import Adapted
from gruppo.utils.imports import file_of


def code_digest(source: str | bytes, function: Any) -> str:
    """SHA-256 of the file that defines a function; of a pickled function, of its code and of the values that it uses.

    `source`: its import path or pickle. Values are constants, defaults, variables of enclosing functions, attributes of
    an instance, and the global variables of its own module that it names.
    """
    if isinstance(function, Adapted):
        function = function.function
    if isinstance(source, bytes):
        digest = hashlib.sha256()
        original = getattr(function, "func", function)  # a partial has the module of functools
        for part in _parts(function, {}, getattr(original, "__module__", None)):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()
    module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
    return hashlib.sha256(file_of(module) or source.encode()).hexdigest()


def old_digest(function: Any) -> str | None:
    """The hash of a function passed from Python in run folders of earlier versions: of its bytecode without constants.
    None if it has no bytecode; these versions hashed its pickle, which is another one in every process."""
    code = getattr(function, "__code__", None)
    return None if code is None else hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()


def _parts(value: Any, seen: dict[int, Any], module: str | None) -> Iterator[str]:
    """Texts that describe a value, the same in every process.

    `seen`: what was described before, or is being described; `module`: of the function whose identity this is.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{type(value).__name__} {value!r}"
        return
    yield type(value).__name__
    if id(value) in seen:
        return
    seen[id(value)] = value
    for inner in _inner(value, module):
        yield from _parts(inner, seen, module)
    if isinstance(value, list | tuple | dict | set | frozenset | types.CodeType):
        del seen[id(value)]  # equal values are described equally, whether or not they are one object


def _inner(value: Any, module: str | None) -> Iterator[Any]:
    """The values that a value consists of. Functions and classes of other modules than `module` are only named."""
    if isinstance(value, types.FunctionType | type) and value.__module__ not in ("__main__", module):
        yield (value.__module__, value.__qualname__)
        return
    if isinstance(value, set | frozenset):
        yield from sorted("\0".join(_parts(item, {}, module)) for item in value)  # their order differs by process
        return
    if parts := next((parts for kind, parts in _KINDS if isinstance(value, kind)), None):
        yield from parts(value)
    elif getattr(value, "__dict__", None):
        yield from (type(value), vars(value))
    else:
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            yield reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:  # noqa: BLE001  any object, with any code of its own
            yield type(value).__qualname__


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (function.__code__, function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield None
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for name in sorted(names & function.__globals__.keys()):
        yield (name, function.__globals__[name])


def _of_class(kind: type) -> Iterator[Any]:
    hidden = {"__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"}
    yield (kind.__qualname__, [base.__qualname__ for base in kind.__bases__])
    yield {name: part for name, part in sorted(vars(kind).items()) if name not in hidden}


# Type -> the values that a value of this type consists of.
_KINDS: list[tuple[Any, Callable[[Any], Iterable[Any]]]] = [
    (types.ModuleType, lambda module: [module.__name__]),
    (types.CodeType, lambda code: [code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_consts]),
    (types.FunctionType, _of_function),
    (types.MethodType, lambda method: [method.__func__, method.__self__]),
    (partial, lambda call: [call.func, call.args, call.keywords]),
    (staticmethod | classmethod, lambda method: [method.__func__]),
    (property, lambda attribute: [attribute.fget, attribute.fset]),
    (list | tuple, list),
    (Mapping, lambda mapping: [(key, mapping[key]) for key in mapping]),
    (type, _of_class),
]
