"""What a model talks to while it completes a prompt. No torch: objects of users live in processes of their own.

Ours is an object with

    reset(row, seed) -> str | None     what the prompt ends with; `row`: the prompt and the columns of the question
    step(text) -> Turn                 the answer to what the model wrote since the last one
    get_reward() -> float | None       optional: the reward of the completion, once it is over
    stop = ("\\n",)                     optional, of the class: texts that end a turn, as the model's end token does

and TRL's, as its GRPOTrainer takes them as `environment_factory`, one with reset(**row) and get_reward() whose other
public methods are tools, which the model calls by <tool_call>{"name": …, "arguments": {…}}</tool_call>.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin

from gruppo.errors import UsageError
from gruppo.utils.imports import import_attribute

CALL, CALL_END = "<tool_call>", "</tool_call>"
_OWN = ("reset", "get_reward")  # methods of TRL's classes that are no tools
_LONGEST_ERROR = 500


@dataclass(frozen=True, slots=True)
class Turn:
    """An environment's answer. `observation`: what the model reads next; several texts are a message each; None lets a
    model that has not ended its turn go on with it, and ends the completion of one that has. `done`: it is over, and
    nobody reads the observation. `calls`, `errors`: how many tools were called, and how many of these calls failed."""

    observation: str | Sequence[str] | None = None
    done: bool = False
    calls: int = 0
    errors: int = 0


class Environment(Protocol):
    """See the top of this file."""

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Begin a completion. The completions of a group get one seed, so that they are given the same."""

    def step(self, text: str) -> Turn:
        """Answer to what the model wrote."""


@dataclass(frozen=True)
class Loaded:
    """A class that is ready. `schemas`: of its tools, if it is one of TRL's; `gives_reward`: it has get_reward;
    `digest`: a hash of the file that defines it."""

    make: Callable[[], Environment]
    schemas: list[dict[str, Any]]
    stop: tuple[str, ...]
    gives_reward: bool
    digest: str


def load_environment(name: str, options: Mapping[str, Any]) -> Loaded:
    """The class behind an import path. Raises UsageError where it cannot be imported or made, or is none of the two
    kinds."""
    kind = import_attribute(name, "environment.name")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise UsageError(f"environment.options = {dict(options)}: {error}; write the arguments of {name}") from None
    except ValueError:
        pass  # no signature: the call tells
    try:
        tried = kind(**options)
    except Exception as error:
        raise UsageError(
            f'environment.name = "{name}": an object of it cannot be made ({type(error).__name__}: {error}); mend it, '
            "or environment.options"
        ) from error
    if not callable(getattr(tried, "reset", None)):
        raise UsageError(
            f'environment.name = "{name}": it has no method reset; write def reset(self, row, seed) and def step(self, '
            "text), or a class of TRL's with reset(self, **row) and tools as methods"
        )
    if not is_ours(tried) and _hears_text(tried):
        raise UsageError(
            f'environment.name = "{name}": it has step(self, text), but its reset is not reset(self, row, seed); write '
            "that, or call the tool something else than step"
        )
    module = sys.modules.get(type(tried).__module__)
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes() if file else name.encode()).hexdigest()
    gives = callable(getattr(tried, "get_reward", None))
    if is_ours(tried):
        if odd := [each for each in ("reset", "step") if inspect.iscoroutinefunction(getattr(tried, each))]:
            raise UsageError(
                f'environment.name = "{name}": {odd[0]} is async, which a class of TRL\'s can be; write def {odd[0]}(…)'
            )
        return Loaded(lambda: kind(**options), [], _stop(tried, name), gives, digest)
    schemas = [schema_of(method, tool) for tool, method in tools_of(tried).items()]
    if not schemas:
        raise UsageError(
            f'environment.name = "{name}": it has neither step(self, text) with reset(self, row, seed), nor public '
            "methods that the model could call as tools; write one of them"
        )
    return Loaded(lambda: Tools(kind(**options)), schemas, (), gives, digest)


def is_ours(made: Any) -> bool:
    """Whether an object is of our kind: it has `step`, and `reset` takes a row and a seed and nothing else."""
    parameters = inspect.signature(made.reset).parameters.values()
    return callable(getattr(made, "step", None)) and [each.name for each in parameters] == ["row", "seed"]


def _hears_text(made: Any) -> bool:
    """Whether an object has the `step` of our kind."""
    step = getattr(made, "step", None)
    return callable(step) and list(inspect.signature(step).parameters) == ["text"]


def _stop(made: Any, name: str) -> tuple[str, ...]:
    stop = getattr(made, "stop", ())
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or any(not isinstance(each, str) or not each for each in texts):
        raise UsageError(f'environment.name = "{name}": stop = {stop!r} is no list of texts; write stop = ("\\n",)')
    return tuple(texts)


def tools_of(made: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an object of TRL's kind that the model can call, by name."""
    names = [name for name, _ in inspect.getmembers(type(made), inspect.isfunction)]
    return {name: getattr(made, name) for name in names if not name.startswith("_") and name not in _OWN}


class Tools:
    """An object of TRL's kind, as one of ours."""

    def __init__(self, target: Any) -> None:
        self.target, self.tools = target, tools_of(target)

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """TRL's objects get the row by name and no seed: Python's own random numbers are seeded instead, outside."""
        return awaited(self.target.reset(**_accepted(self.target.reset, row)))  # type: ignore[no-any-return]

    def step(self, text: str) -> Turn:
        """Call what the text calls, in order; what fails is an observation, which the model can learn from."""
        results, errors = [], 0
        for body in tool_calls(text):
            try:
                results.append(self._called(body))
            except (Exception, SystemExit) as error:  # noqa: BLE001  the model reads what was wrong
                errors += 1
                results.append(f"Error: {_told(error)}")
        return Turn(results or None, calls=len(results), errors=errors)

    def get_reward(self) -> Any:
        """The object's own."""
        return awaited(self.target.get_reward())

    def _called(self, body: str) -> str:
        name, arguments = parsed_call(body)
        if name not in self.tools:
            raise _BadCall(f"there is no tool {name!r}; there are: {', '.join(self.tools)}")
        tool = self.tools[name]
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            raise _BadCall(f"{name}: {error}") from None
        return _as_text(awaited(tool(**arguments)))


class _BadCall(Exception):  # noqa: N818  told to the model without its name
    """A call that cannot be made."""


def tool_calls(text: str) -> list[str]:
    """What stands within <tool_call> and </tool_call>, each; the last one need not be closed."""
    return [part.partition(CALL_END)[0].strip() for part in text.split(CALL)[1:]]


def parsed_call(body: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call. Raises an exception whose text tells the model what is wrong."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _BadCall(f"the tool call is no JSON ({error or type(error).__name__})") from None
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    arguments = call.get("arguments", {}) if isinstance(call, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise _BadCall(f"arguments are no JSON ({error or type(error).__name__})") from None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        raise _BadCall('a tool call must be {"name": "…", "arguments": {…}}')
    return call["name"], arguments


def _told(error: BaseException) -> str:
    name = "" if isinstance(error, _BadCall) else f"{type(error).__name__}: "
    try:
        return f"{name}{error}"[:_LONGEST_ERROR].removesuffix(": ")
    except Exception:  # noqa: BLE001  an exception of a user's can refuse to be printed
        return type(error).__name__


def _as_text(result: Any) -> str:
    """A tool's result as the model reads it: text as it is, structures as JSON, the rest as Python prints it."""
    if isinstance(result, dict | list | tuple):
        try:
            return json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            pass
    return result if isinstance(result, str) else str(result)


def awaited(result: Any) -> Any:
    """A result, or what a coroutine gives."""

    async def wait() -> Any:
        return await result

    return _loop().run(wait()) if inspect.isawaitable(result) else result


@cache
def _loop() -> asyncio.Runner:
    """One event loop a process, as locks and clients that an object keeps belong to that in which they were made."""
    return asyncio.Runner()


def _accepted(function: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(row)
    names = {each.name for each in parameters}
    return {name: value for name, value in row.items() if name in names}


_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", tuple: "array", dict: "object",
}  # fmt: skip


def schema_of(method: Callable[..., Any], name: str | None = None) -> dict[str, Any]:
    """The JSON schema of a tool, from its signature, its annotations and its docstring, as chat templates take it.
    `name`: what it is called, where that is not the function's own."""
    said, arguments = _documented(inspect.getdoc(method) or "")
    try:
        hints = typing.get_type_hints(method)
    except Exception:  # noqa: BLE001  annotations of users can name anything
        hints = {}
    properties, required = {}, []
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        told = {"description": arguments[parameter.name]} if parameter.name in arguments else {}
        properties[parameter.name] = {**_json_type(hints.get(parameter.name)), **told}
        required += [parameter.name] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name or method.__name__, "description": said, "parameters": parameters}
    return {"type": "function", "function": function}


def _json_type(hint: Any) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        known = [_json_type(each) for each in inner if each is not type(None)]
        return known[0] if len(known) == 1 else {"anyOf": known}
    if origin is Literal:
        return {"type": _TYPES.get(type(inner[0]), "string"), "enum": list(inner)}
    kind = _TYPES.get(origin or hint)
    if kind == "array" and inner:
        return {"type": "array", "items": _json_type(inner[0])}
    return {"type": kind} if kind else {}


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says above "Args:", and of each argument below it."""
    above, _, below = text.partition("Args:")
    found: dict[str, str] = {}
    last = ""
    indent = None
    for line in below.splitlines():
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if not depth:  # the next section, or text behind the arguments
            break
        indent = depth if indent is None else indent
        name, colon, said = line.strip().partition(":")
        if depth == indent and colon:
            last = name.partition("(")[0].strip()
            found[last] = said.strip()
        elif last:
            found[last] = f"{found[last]} {line.strip()}".strip()
    return " ".join(above.partition("Returns:")[0].split()), found
