"""From the arguments of another trainer to a recipe with comments, and a summary of what was done."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from gruppo.config.loading import recipe_tables
from gruppo.config.recipe import Recipe
from gruppo.conversion import openrlhf, trl, verl
from gruppo.conversion.draft import FILL_IN, Draft
from gruppo.conversion.given import Source
from gruppo.conversion.reading import read
from gruppo.errors import one_line

_READ_AS = {"TRL": "TRL 1.16", "verl": "verl 0.9", "OpenRLHF": "OpenRLHF 0.11"}
_CONVERSIONS = {"TRL": trl.convert, "verl": verl.convert, "OpenRLHF": openrlhf.convert}


@dataclass(frozen=True)
class Conversion:
    """A recipe as text, and the lines that say what happened to the arguments."""

    recipe: str
    source: Source
    draft: Draft

    @property
    def summary(self) -> str:
        """How much was mapped, written out, ignored and left without equivalent; the latter with its lines."""
        entries = self.draft.fields.values()
        given = sum(entry.given for entry in entries)
        lines = [
            f"{self.source.origin}: {self.draft.trainer}, {self.source.method}",
            f"  fields from the arguments  {given + len(self.draft.mixture)}",
            f"  defaults written out       {len(entries) - given}",
            f"  ignored without harm       {len(self.draft.ignored)}",
            f"  without equivalent         {len(self.draft.missing)}",
            *(f"    {line}" for line in self.draft.missing),
            f"  to fill in                 {len(self.draft.to_fill)}",
            *(f"    {line}" for line in self.draft.to_fill),
        ]
        return "\n".join(map(_visible, lines))


def convert(arguments: Sequence[str], source: str | None = None, processes: int | None = None) -> Conversion:
    """Convert the arguments of TRL, verl or OpenRLHF to a recipe.

    `arguments`: a YAML file or a shell script, possibly followed by overrides, or a command line. `source`: which
    trainer and method, one of gruppo.conversion.reading.SOURCES; by default, the names in the file decide. `processes`:
    how many processes train (TRL's batch is per device). Nothing of a file is run. Raises UsageError with the place and
    the fix if the arguments cannot be read.
    """
    found = read(arguments, source, processes)
    draft = _CONVERSIONS[found.trainer](found)
    draft.lacks(found.unknown)
    for note in found.notes:
        draft.remark(note)
    draft.by_table()
    if "model.name" not in draft.fields:
        draft.ask("model.name", "smollm2-135m-instruct", "the model: a hub name or a folder")
    draft.spread()
    draft.settle()
    return Conversion(_text(found, draft), found, draft)


def _text(source: Source, draft: Draft) -> str:
    """The recipe as TOML, with a comment behind each field and the rest of the arguments at the end."""
    blocks = [_header(source, draft)]
    tables: dict[str, list[str]] = {}
    order = [f"{table}.{field}" for table, fields in recipe_tables() for field in fields]
    for name, entry in sorted(draft.fields.items(), key=lambda item: order.index(item[0])):
        table, _, field = name.rpartition(".")
        line = f"{_key(field)} = {toml_value(entry.value)}"
        tables.setdefault(table, []).append(f"{line}{' ' * max(2, 40 - len(line))}# {one_line(entry.comment)}")
    for table in sorted(tables, key=_position):
        blocks.append("\n".join([f"[{table}]", *tables[table]]))
    for row in draft.mixture:
        blocks.append("\n".join(["[[mixture]]", *(f"{_key(key)} = {toml_value(value)}" for key, value in row.items())]))
    blocks += [_comments("Without equivalent", draft.missing), _comments("Ignored without harm", draft.ignored)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _header(source: Source, draft: Draft) -> str:
    lines = [
        f"Converted by `gruppo convert` from {source.origin}, read as {_READ_AS[draft.trainer]} ({source.method})."
    ]
    if draft.to_fill:
        lines.append(f"Fill in before training (marked {FILL_IN} below, where there is a line for it):")
        lines += [f"- {line}" for line in draft.to_fill]
    return "\n".join(_wrapped(line) for line in [*lines, *draft.remarks])


def _comments(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"# {title}:", *(_wrapped(f"- {line}") for line in lines)]) if lines else ""


def _wrapped(line: str) -> str:
    wrapper = textwrap.TextWrapper(118, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
    wrapper.break_on_hyphens = False
    return wrapper.fill(one_line(line))


def _visible(line: str) -> str:
    indent = len(line) - len(line.lstrip(" "))
    return " " * indent + one_line(line)


def _position(table: str) -> tuple[int, str]:
    """The order of the tables, as in the class Recipe."""
    return [*Recipe.model_fields].index(table.partition(".")[0]), table


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).rpartition(" = ")[0]


def toml_value(value: Any) -> str:
    """A value on one line, as written after `=` in TOML."""
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(str(name))} = {toml_value(item)}" for name, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
