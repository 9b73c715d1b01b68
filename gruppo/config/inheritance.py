"""What the tasks of [evaluation] and [[benchmarks]] inherit from the training task: how a row becomes a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Fields of a task that decide how a row becomes a prompt.
INHERITED = ("columns", "template", "system", "chat_template_kwargs", "tools")
# Tasks by name that bring columns and prompts of their own; also all that begin with `_GYM`.
OWN_PROMPTS = frozenset({
    "arithmetic", "gsm8k", "math", "mgsm-zh", "cmath", "sat", "ocw", "minerva", "mmlu-stem", "gaokao-mathcloze",
    "gaokao-mathqa", "svamp", "asdiv", "mawps", "gsm-hard", "aqua", "aime",
})  # fmt: skip

_GYM = "reasoning-gym/"


def with_inherited(data: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a recipe, where evaluation tasks have the fields of the training task that they do not set.

    The training task is [task], or the table of a [[mixture]] with the same name; if there is none, the fields that
    all tables of the mixture agree on are inherited. A task with prompts of its own inherits only the system message
    and the variables of the chat template, and in [[benchmarks]] only the latter, unless training uses the same task.
    Tables with `inherit = false`, and tables that are not valid anyway, are unchanged.
    """
    mixture = data.get("mixture")
    tables = mixture if isinstance(mixture, list | tuple) and mixture else [data.get("task")]
    sources = [source for source in tables if isinstance(source, Mapping)]
    recipe = dict(data)
    if sources and isinstance(recipe.get("evaluation"), Mapping):
        recipe["evaluation"] = _inherited(recipe["evaluation"], sources, ("system", "chat_template_kwargs"))
    if sources and isinstance(recipe.get("benchmarks"), list | tuple):
        own = ("chat_template_kwargs",)
        recipe["benchmarks"] = [
            _inherited(table, sources, own) if isinstance(table, Mapping) else table for table in recipe["benchmarks"]
        ]
    return recipe


def inherits(data: Mapping[str, Any], table: Mapping[str, Any]) -> bool:
    """Whether an evaluation table of the recipe would inherit anything."""
    changed = with_inherited({**data, "evaluation": table, "benchmarks": [table]})
    return bool(changed["evaluation"] != table or changed["benchmarks"] != [table])


def _inherited(table: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], own: Sequence[str]) -> Mapping[str, Any]:
    """The table with the inherited fields of its task. `own`: fields for a task with prompts of its own."""
    task = table.get("task")
    if isinstance(task, str):
        task = {"name": task}
    if not isinstance(task, Mapping) or table.get("inherit") is False:
        return table
    name = task.get("name", "arithmetic")
    same = [source for source in sources if source.get("name", "arithmetic") == name]
    fields = INHERITED if same or not _has_own_prompts(name) else own
    found = {field: value for field in fields if (value := _common(same or sources, field)) is not None}
    options = task.get("options")
    if isinstance(options, Mapping) and options.get("format") == "text":
        found = {field: value for field, value in found.items() if field in {"columns", "template"}}  # stay text
    written = {field: value for field, value in task.items() if value is not None}
    return {**table, "task": {**found, **written}} if found.keys() - written.keys() else table


def _has_own_prompts(name: Any) -> bool:
    return isinstance(name, str) and (name in OWN_PROMPTS or name.startswith(_GYM))


def _common(sources: Sequence[Mapping[str, Any]], field: str) -> Any:
    """The value of a field in all sources; None if it is missing, an empty table or list, of the wrong type, or
    differs."""
    value = sources[0].get(field)
    kind = {"columns": Mapping, "chat_template_kwargs": Mapping, "tools": list}.get(field, str)
    valid = isinstance(value, kind) and (value or kind is str)
    return value if valid and all(source.get(field) == value for source in sources) else None
