"""What a recipe and the rows of a dataset may pass to a chat template: variables, and the tools that it describes."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

# Arguments and names of the rendering itself, with what to write in their place.
_RESERVED = {
    **dict.fromkeys(("messages", "conversation", "conversations"), "a row's prompt gives the messages"),
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message"),
        "gruppo asks for an answer, or lets the model continue a last message of the assistant",
    ),
    **dict.fromkeys(
        (
            "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
            "return_assistant_tokens_mask", "sanitize_control_tokens",
        ),
        "gruppo tokenizes the prompt",
    ),
    **dict.fromkeys(("chat_template", "template"), "the template is that of the model's tokenizer"),
    **dict.fromkeys(
        (
            "raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner", "self",
            "loop", "caller", "varargs", "kwargs",
        ),
        "it is a name of the template language",
    ),
    "tools": "the field and the column `tools` give the tools",
}  # fmt: skip
_EXAMPLE = "chat_template_kwargs = {enable_thinking = false}"
_TOOL = '[{type = "function", function = {name = "add", parameters = {type = "object"}}}]'


def check_kwargs(kwargs: Any) -> None:
    """Raise ValueError unless these are variables of a template by name."""
    name = "chat_template_kwargs"
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{name} = {kwargs!r:.60}: is not a table of variables; write e.g. {_EXAMPLE}")
    for key, value in kwargs.items():
        if key in _RESERVED:
            raise ValueError(
                f"{name}.{key} = {value!r:.60}: is not an option of a template: {_RESERVED[key]}; remove it"
            )
        if not isinstance(key, str) or not key.isidentifier() or keyword.iskeyword(key):
            raise ValueError(f"{name}.{key} = {value!r:.60}: is not the name of a variable; write e.g. {_EXAMPLE}")


def check_tools(tools: Any) -> None:
    """Raise ValueError unless this is a list of JSON schemas: of tables with a name or a type."""
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools = {tools!r:.60}: is not a list of JSON schemas; write e.g. {_TOOL}")
    for place, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not any(isinstance(tool.get(key), str) for key in ("type", "name")):
            raise ValueError(f"tools[{place}] = {tool!r:.60}: is not the JSON schema of a function; write e.g. {_TOOL}")


def check_json(value: Any, name: str) -> None:
    """Raise ValueError if a value is not one of JSON's, or is null, which TOML lacks."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_json(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            check_json(item, f"{name}[{place}]")
    elif value is None:
        raise ValueError(f"{name} = None: has no value; leave it out")
    elif not isinstance(value, str | int | float):
        raise ValueError(f'{name} = {value}: must be text, a number, true, false, a list or a table; write "{value}"')
