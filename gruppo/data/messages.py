"""Check conversations, and bring the forms in which datasets write them into one form.

The form: a list of messages with a known `role` and a `content` of text, or None for an assistant that only calls
tools. Content as a list of parts is joined, a conversation or the arguments of a tool call as JSON text are parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.errors import UsageError, nearest
from gruppo.types import Message
from gruppo.utils.text import text_of_part

EXAMPLES = '{"prompt": "text"} or {"prompt": [{"role": "user", "content": "text"}]}'
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")

_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "model": "assistant"}
_PYTHON = re.compile(r"\s*[\[{]\s*\{?\s*'(?:role|content)'\s*:")


def parsed(text: str, kind: type) -> Any:
    """The value of a JSON text, if it has this type; else None."""
    if not text.lstrip().startswith("[" if kind is list else "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def text_or_messages(value: Any, where: str, column: str) -> str | list[Message]:
    """Text unchanged; a conversation, which may be JSON text, checked and in one form.

    Raises UsageError, naming the row (`where`), the column and the message, for anything else.
    """
    if isinstance(value, str):
        listed = parsed(value, list)
        if listed and all(isinstance(entry, Mapping) and "role" in entry for entry in listed):
            value = listed
        elif _PYTHON.match(value):
            raise UsageError(
                f"{where}: {column} = {value[:60]!r} is a list as Python prints it; save the rows as JSON Lines or "
                "Parquet, or write the list as JSON"
            )
        else:
            return value
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"{where}: {column} = {value!r:.200} is neither text nor a list of messages; write {EXAMPLES}")
    return [_message(message, f"{where}: {column}[{place}]") for place, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    """A message without the keys that have no value, and without an empty list of tool calls."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        hint = (
            "; rename from and value to role and content" if isinstance(message, Mapping) and "from" in message else ""
        )
        raise UsageError(f"{where} = {message!r:.200} is a message without role and content; write {EXAMPLES}{hint}")
    role = message["role"]
    if role not in ROLES:
        raise UsageError(
            f'{where}.role = "{role}": unknown; '
            + (f'write "{_OTHER_ROLES[role.lower()]}"' if role.lower() in _OTHER_ROLES else f"write {_listed(role)}")
        )
    kept = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], f"{where}.tool_calls")
        if not kept["tool_calls"]:  # templates ask only whether the key is there
            del kept["tool_calls"]
    content = message.get("content")
    if content is not None:
        return {**kept, "content": _content(content, f"{where}.content")}
    if role == "assistant" and kept.get("tool_calls"):
        return {**kept, "content": None}
    raise UsageError(f"{where} = {message!r:.200} is a message without role and content; write {EXAMPLES}")


def _listed(role: str) -> str:
    close = nearest(role, ROLES)
    return close.removeprefix("; known: ") if close.startswith("; known") else f"{', '.join(ROLES)}{close}"


def _content(content: Any, where: str) -> str:
    """Content as text: itself, or the texts of its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UsageError(f"{where} = {content!r:.100} is neither text nor a list of parts; write text")
    texts = []
    for place, part in enumerate(content):
        text = text_of_part(part)
        if text is None:
            kind = part.get("type") if isinstance(part, Mapping) else None
            what = f'a part of the type "{kind}"' if isinstance(kind, str) else f"the part {part!r:.60}"
            raise UsageError(
                f"{where}[{place}]: is {what}, but gruppo's models read only text; leave the row out, or describe it "
                "in words"
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    if isinstance(calls, str):
        calls = parsed(calls, list)
    if not isinstance(calls, list | tuple):
        raise UsageError(f"{where} = {calls!r:.100} is not a list of tool calls; write one")
    return [_tool_call(call, f"{where}[{place}]") for place, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object, without other keys that have no value."""
    if not isinstance(call, Mapping):
        raise UsageError(f'{where} = {call!r:.100} is not a tool call; write {{"name": …, "arguments": {{…}}}}')
    kept = {key: value for key, value in call.items() if value is not None or key == "arguments"}
    if isinstance(kept.get("function"), Mapping):
        return {**kept, "function": _tool_call(kept["function"], f"{where}.function")}
    if "arguments" in kept:
        kept["arguments"] = _arguments(kept["arguments"], f"{where}.arguments")
    return kept


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    found = parsed(arguments, dict) if isinstance(arguments, str) else arguments
    if not isinstance(found, Mapping):
        raise UsageError(f'{where} = {arguments!r:.100} is not an object; write e.g. {{"city": "Paris"}}')
    return dict(found)


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], str | None]:
    """The messages before the assistant's answer that ends a conversation, and its text; None if there is none.

    The answer of several messages (tool calls and their results) is the last one.
    """
    end = len(messages)
    while end > 1 and messages[end - 1]["role"] not in ("user", "system", "developer"):
        end -= 1
    if end == len(messages) or messages[-1]["role"] != "assistant" or messages[end - 1]["role"] != "user":
        return list(messages), None
    return list(messages[:end]), messages[-1]["content"] or ""
