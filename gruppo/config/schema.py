"""The recipe described, from the one place where its fields are documented: for editors, for readers, and as it stands.

`json_schema` is what TOML editors complete and check with, `markdown` the page docs/recipe.md, `annotated` a recipe
with every default written out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w

from gruppo.config.method_section import Critic, Method
from gruppo.config.methods import METHODS
from gruppo.config.recipe import Recipe
from gruppo.config.sections import (
    Audit,
    Benchmark,
    Decoding,
    Environment,
    Evaluation,
    Lora,
    Model,
    Optimizer,
    Reward,
    RewardModel,
    Run,
    Sampling,
    Section,
    Task,
)

EXTENDS = (
    "Path of a recipe, relative to this file, that this one is laid over: tables field by field, everything else whole."
)

# The tables of a recipe, in the order of the page; the same fields may stand in several places.
TABLES: dict[str, type[Section]] = {
    "[run]": Run,
    "[model]": Model,
    "[model.lora]": Lora,
    "[task], [[mixture]], [evaluation.task], [benchmarks.task]": Task,
    "[reward]": Reward,
    "[reward_model]": RewardModel,
    "[environment]": Environment,
    "[audit]": Audit,
    "[method]": Method,
    "[critic]": Critic,
    "[sampling]": Sampling,
    "[optimizer]": Optimizer,
    "[evaluation]": Evaluation,
    "[evaluation.decoding], [benchmarks.decoding]": Decoding,
    "[[benchmarks]]": Benchmark,
}
# Tables within tables: no fields, and described where their own fields are.
_INNER = {(Model, "lora"), (Evaluation, "decoding"), (Benchmark, "decoding")}


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, in the draft that TOML editors read. A recipe that extends another may leave out the
    model."""
    made: dict[str, Any] = _plain(Recipe.model_json_schema(ref_template="#/definitions/{model}"))
    definitions = made.pop("$defs")
    named = {"model": {"required": definitions["Model"].pop("required")}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of gruppo",
        "description": "Everything that decides what a run computes. Printed by `gruppo schema`.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": {"type": "string", "minLength": 1, "description": EXTENDS}, **made["properties"]},
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": made["required"], "properties": named},
        "definitions": definitions,
    }


def _plain(schema: Any) -> Any:
    """Without what TOML has no word for (null), titles that repeat names, and defaults that are whole tables."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if kept.get("default", 0) is None or "$ref" in kept:
        kept.pop("default", None)
    if "anyOf" in kept:
        kept["anyOf"] = [each for each in kept["anyOf"] if each != {"type": "null"}]
        if len(kept["anyOf"]) == 1:
            kept |= kept.pop("anyOf")[0]
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return {key: value if key == "default" else _plain(value) for key, value in kept.items()}


def markdown() -> str:
    """docs/recipe.md: a section a table, a row a field."""
    schema = json_schema()
    count = sum(1 for _ in _fields())
    lines = [
        "# The recipe, field by field",
        "",
        "<!-- Made by `gruppo schema --markdown > docs/recipe.md`; the texts stand in gruppo/config/units.py. -->",
        "",
        f"{count} fields; only `model.name` has no default. `gruppo train RECIPE --show` prints a recipe with",
        "every value that it comes to.",
        "",
        f'`extends = "other.toml"`, above the first table: {EXTENDS[0].lower()}{EXTENDS[1:]}',
        "A [task] replaces the [[mixture]] of the other and a [[mixture]] its [task]; `run.name` is never taken over.",
    ]
    for title, table in TABLES.items():
        lines += ["", f"## {title}", "", " ".join((table.__doc__ or "").split()), ""]
        lines += ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
        properties = schema["definitions"][table.__name__]["properties"]
        for name, field in table.model_fields.items():
            if (table, name) in _INNER or _inherited(table, name):
                continue
            meaning = " ".join((field.description or "").split()).replace("<", "&lt;")
            default = "" if field.is_required() else _literal(field.default)
            others = [
                f"{method}: {_literal(row.settings[name])}" for method, row in METHODS.items() if name in row.settings
            ]
            if table is Method and others:
                default += "; " + ", ".join(others)
            cells = (f"`{name}`", _values(properties[name]), default, meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _fields() -> Iterator[str]:
    """Every field once."""
    for title, table in TABLES.items():
        names = (name for name in table.model_fields if (table, name) not in _INNER and not _inherited(table, name))
        yield from (f"{title} {name}" for name in names)


def _inherited(table: type[Section], name: str) -> bool:
    """Whether a field is described with the table that has it first."""
    return any(name in getattr(base, "model_fields", {}) for base in table.__bases__)


def _literal(value: Any) -> str:
    """A default for the page; nothing for None."""
    return "" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    """A value as it stands behind `=` in TOML; of tables, the empty one only."""
    return "{}" if value == {} else tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _values(schema: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return ", ".join(f'`"{each}"`' for each in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_values(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return "table"
    if schema["type"] == "array":
        return "list of " + {"string": "texts", "number": "numbers"}[schema["items"]["type"]]
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "object": "table"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema)
    return f"{words[schema['type']]} {bounds}".strip()


def annotated(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every field under its documentation; reading it again gives an equal recipe."""
    blocks: list[str] = []
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if isinstance(value, Section) and not (name == "task" and recipe.mixture):
            blocks += _table(name, value)
        elif isinstance(value, list):
            blocks += [line for each in value for line in _table(name, each, repeated=True)]
            if not value and f"[[{name}]]" in TABLES:
                blocks += [f"{_comment(TABLES[f'[[{name}]]'].__doc__)}# [[{name}]]\n"]
        elif value is None:
            blocks += [f"{_comment(TABLES[f'[{name}]'].__doc__)}# [{name}]\n"]
    return "\n".join(blocks)


def _table(header: str, section: Section, repeated: bool = False) -> list[str]:
    """A table and those inside it, which TOML wants behind its own fields."""
    text = _comment(type(section).__doc__) + (f"[[{header}]]\n" if repeated else f"[{header}]\n")
    inner: list[str] = []
    for name, field in type(section).model_fields.items():
        value, note = getattr(section, name), _comment(field.description)
        if isinstance(value, Section):
            inner += _table(f"{header}.{name}", value)
        elif isinstance(value, dict) and value:
            for part in reversed([*header.split("."), name]):
                value = {part: value}
            inner.append(note + tomli_w.dumps(value))
        elif value is None and (type(section), name) in _INNER:
            inner.append(f"{note}# [{header}.{name}]\n")
        elif value is None:
            text += f"{note}# {name} = …\n"
        else:
            text += f"{note}{name} = {_toml(value)}\n"
    return [text, *inner]


def _comment(text: str | None) -> str:
    return textwrap.fill(" ".join((text or "").split()), 100, initial_indent="# ", subsequent_indent="# ") + "\n"
