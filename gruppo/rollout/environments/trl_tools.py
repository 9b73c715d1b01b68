"""TRL's environments: methods as tools, their schemas, and the calls that a model writes."""

from __future__ import annotations

import asyncio
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

from gruppo.rollout.environments.protocol import Turn


def awaited(result: Any) -> Any:
    """A result, or what a coroutine gives."""

    async def wait() -> Any:
        return await result

    return _loop().run(wait()) if inspect.isawaitable(result) else result


@cache
def _loop() -> asyncio.Runner:
    """One event loop a process, as locks and clients that an object keeps belong to that in which they were made."""
    return asyncio.Runner()


def accepted_arguments(function: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that a function has parameters for."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(row)
    names = {each.name for each in parameters}
    return {name: value for name, value in row.items() if name in names}


CALL, CALL_END = "<tool_call>", "</tool_call>"


_OWN = ("reset", "get_reward")  # methods of TRL's classes that are no tools


_LONGEST_ERROR = 500


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
        return awaited(self.target.reset(**accepted_arguments(self.target.reset, row)))  # type: ignore[no-any-return]

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
