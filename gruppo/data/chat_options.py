"""The chat-template options of a row: variables and tools from its task and from its own columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gruppo.config.chat_options import check_kwargs, check_tools
from gruppo.errors import UsageError
from gruppo.types import Row

if TYPE_CHECKING:
    from gruppo.config.sections import Task

KWARGS, TOOLS = "chat_template_kwargs", "tools"  # columns, and fields of a task


@dataclass(frozen=True)
class ChatOptions:
    """What a task passes to the chat template with every row: variables by name, and tools as JSON schemas."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task) -> ChatOptions:
        """The options in a task's fields."""
        return cls(task.chat_template_kwargs or {}, task.tools or [])

    def of_row(self, row: Row, where: str, table: str) -> dict[str, Any]:
        """Arguments of the chat template for a row: its own variables override the task's one by one, and its own
        tools replace the task's.

        Columns may contain JSON text, which is read once. Text prompts have no options. `table`: name of the task's
        table in errors. Raises UsageError for columns that are no options.
        """
        if isinstance(row["prompt"], str):
            return {}
        try:
            kwargs = _own_kwargs(row.get(KWARGS))
            tools = _own_tools(row.get(TOOLS))
        except ValueError as error:
            name = TOOLS if str(error).startswith(TOOLS) else KWARGS
            raise UsageError(
                f'{where}: {error}, or rename the column: {table}.columns = {{other = "{name}"}}'
            ) from None
        options = {**self.kwargs, **kwargs}
        if tools := self.tools if tools is None else tools:
            options[TOOLS] = tools
        return options


def _own_kwargs(given: Any) -> dict[str, Any]:
    content = _read(given, KWARGS)
    if content is None:
        return {}
    check_kwargs(content)
    return {name: value for name, value in content.items() if value is not None}  # null: not given in this row


def _own_tools(given: Any) -> list[dict[str, Any]] | None:
    content = _read(given, TOOLS)
    if content is None:
        return None
    tools = content
    if isinstance(content, list | tuple):
        tools = [_with_parameters(_read(tool, f"{TOOLS}[{place}]"), place) for place, tool in enumerate(content)]
    check_tools(tools)
    return list(tools)


def _with_parameters(tool: Any, place: int) -> Any:
    """The tool, where a function and its parameters may be JSON text too."""
    if not isinstance(tool, Mapping):
        return tool
    read = {
        name: _read(value, f"{TOOLS}[{place}].{name}") if name in ("function", "parameters") else value
        for name, value in tool.items()
    }
    return {**read, "function": _with_parameters(read["function"], place)} if "function" in read else read


def _read(value: Any, name: str) -> Any:
    """A value of a column, with JSON text parsed; None for no value. Raises ValueError for other text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} = {value!r:.60}: is neither JSON nor its text; write JSON") from None
