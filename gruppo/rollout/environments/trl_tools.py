"""Environments written for TRL: methods as tools, their schemas, and the tool calls that a model writes.

TRL's GRPOTrainer takes such classes as `environment_factory`. An object has reset(**row) and optionally get_reward();
its other public methods are tools, which the model calls with
<tool_call>{"name": …, "arguments": {…}}</tool_call>.
"""

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
    """The result, awaited if it is awaitable."""

    async def wait() -> Any:
        return await result

    return _loop().run(wait()) if inspect.isawaitable(result) else result


@cache
def _loop() -> asyncio.Runner:
    """One event loop per process: an object's locks and clients belong to the loop in which they were created."""
    return asyncio.Runner(loop_factory=asyncio.new_event_loop)  # not the current loop of other code


def accepted_arguments(function: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that a function has parameters for."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(row)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in row.items() if name in names}


CALL, CALL_END = "<tool_call>", "</tool_call>"


_NOT_TOOLS = ("reset", "get_reward")


_LONGEST_ERROR = 500


def tools_of(target: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an object written for TRL that the model can call, by name."""
    names = [name for name, _ in inspect.getmembers(type(target), inspect.isfunction)]
    return {name: getattr(target, name) for name in names if not name.startswith("_") and name not in _NOT_TOOLS}


class Tools:
    """Adapts an object written for TRL to gruppo's protocol."""

    def __init__(self, target: Any) -> None:
        self.target, self.tools = target, tools_of(target)

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Reset the object with the columns that it accepts. It gets no seed: the caller seeds Python's generators."""
        return awaited(self.target.reset(**accepted_arguments(self.target.reset, row)))  # type: ignore[no-any-return]

    def step(self, text: str) -> Turn:
        """Run the tool calls in the text, in order. A failed call gives an observation the model can learn from."""
        results, errors = [], 0
        for body in tool_calls(text):
            try:
                results.append(self._call(body))
            except (Exception, SystemExit) as error:  # noqa: BLE001  the model reads what went wrong
                errors += 1
                results.append(f"Error: {_describe(error)}")
        return Turn(results or None, calls=len(results), errors=errors)

    def get_reward(self) -> Any:
        """The reward of the object."""
        return awaited(self.target.get_reward())

    def _call(self, body: str) -> str:
        name, arguments = parsed_call(body)
        if name not in self.tools:
            raise _BadCall(f"there is no tool {name!r}; there are: {', '.join(self.tools)}")
        tool = self.tools[name]
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            raise _BadCall(f"{name}: {error}") from None
        return _as_text(awaited(tool(**arguments)))


class _BadCall(Exception):  # noqa: N818  shown to the model without its class name
    """An invalid tool call."""


def tool_calls(text: str) -> list[str]:
    """The bodies of all <tool_call>…</tool_call> in a text. The last one need not be closed."""
    return [part.partition(CALL_END)[0].strip() for part in text.split(CALL)[1:]]


def parsed_call(body: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a tool call. Raises an exception whose message tells the model what is wrong."""
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


def _describe(error: BaseException) -> str:
    name = "" if isinstance(error, _BadCall) else f"{type(error).__name__}: "
    try:
        return f"{name}{error}"[:_LONGEST_ERROR].removesuffix(": ")
    except Exception:  # noqa: BLE001  a user-defined exception can fail to be printed
        return type(error).__name__


def _as_text(result: Any) -> str:
    """A tool's result as the model reads it: text unchanged, structures as JSON, anything else as Python prints it."""
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
    """The JSON schema of a tool in the form that chat templates expect, from its signature, annotations and docstring.
    `name`: name of the tool, if it is not that of the function."""
    description, arguments = _parse_docstring(inspect.getdoc(method) or "")
    try:
        hints = typing.get_type_hints(method)
    except Exception:  # noqa: BLE001  user-defined annotations can name anything
        hints = {}
    properties, required = {}, []
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        described = {"description": arguments[parameter.name]} if parameter.name in arguments else {}
        properties[parameter.name] = {**_json_type(hints.get(parameter.name)), **described}
        required += [parameter.name] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name or method.__name__, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _json_type(hint: Any) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        known = [_json_type(option) for option in inner if option is not type(None)]
        return known[0] if len(known) == 1 else {"anyOf": known}
    if origin is Literal:
        return {"type": _TYPES.get(type(inner[0]), "string"), "enum": list(inner)}
    kind = _TYPES.get(origin or hint)
    if kind == "array" and inner:
        return {"type": "array", "items": _json_type(inner[0])}
    return {"type": kind} if kind else {}


def _parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring above "Args:", and the description of each argument below it."""
    above, _, below = text.partition("Args:")
    arguments: dict[str, str] = {}
    last = ""
    indent = None
    for line in below.splitlines():
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if not depth:  # the next section, or text after the arguments
            break
        indent = depth if indent is None else indent
        name, colon, description = line.strip().partition(":")
        if depth == indent and colon:
            last = name.partition("(")[0].strip()
            arguments[last] = description.strip()
        elif last:
            arguments[last] = f"{arguments[last]} {line.strip()}".strip()
    return " ".join(above.partition("Returns:")[0].split()), arguments
