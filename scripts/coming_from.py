"""Write the tables of names and the recipes of the examples into docs/coming_from.md.

    make coming-from        (or: python scripts/coming_from.py)

The tables come from gruppo/config/foreign_table.py and the names in gruppo/conversion/names.yaml; the recipes are what
`gruppo convert` makes of the block above them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gruppo.config.foreign_names import NOTHING, fields_named, gruppo_name, is_ignored
from gruppo.config.foreign_table import IGNORED
from gruppo.config.loading import recipe_tables
from gruppo.conversion import openrlhf, trl, verl
from gruppo.conversion.convert import convert
from gruppo.conversion.given import written
from gruppo.conversion.reading import names

PAGE = Path("docs/coming_from.md")
METHODS = ("training", "model", "script", "mixture", "grpo", "rloo", "dpo", "sft", "reward")
FILES = {"trl": "grpo.yaml", "verl": "run_grpo.sh", "openrlhf": "train.sh"}
FIELDS = list(recipe_tables())


def answer(name: str) -> str:
    """What the table of foreign names says of a name."""
    location = name.split(".")
    return gruppo_name(location) or fields_named(location, FIELDS)[0]


def listed(trainer: str) -> tuple[list[str], Mapping[str, Any]]:
    """The names of a trainer, each once, and those of its defaults that a recipe writes out."""
    if trainer == "trl":
        every = [name for method in METHODS for name in names()[method]]
        return list(dict.fromkeys(every)), {**trl.DEFAULTS["grpo"], **trl.LORA}
    return names()[trainer], {"verl": verl.DEFAULTS, "openrlhf": openrlhf.DEFAULTS}[trainer]


def tables(trainer: str) -> Iterator[str]:
    """Three tables of a trainer: what has a field, what has no equivalent, what needs none."""
    every, defaults = listed(trainer)
    answers = {name: answer(name) for name in every}
    yield from ("| name | default | in a recipe |", "| --- | --- | --- |")
    for name, text in answers.items():
        if not text.startswith(NOTHING):
            default = f"`{written(defaults[name])}`" if name in defaults else ""
            words = re.sub(r"(?<![`\w])((?:[a-z_]+\.)+[a-z_0-9]+|--[a-z]+)", r"`\1`", text)
            yield f"| `{name}` | {default} | {words} |"
    yield from ("", "Without equivalent:", "", "| names | why |", "| --- | --- |")
    missing = [text for text in dict.fromkeys(answers.values()) if text.startswith(NOTHING) and not is_ignored(text)]
    for text in missing:
        inside = ", ".join(f"`{name}`" for name in every if answers[name] == text)
        yield f"| {inside} | {text.removeprefix(NOTHING)} |"
    yield from ("", "Ignored without harm (`*` stands for any text):", "", "| names | why |", "| --- | --- |")
    for reason, patterns in IGNORED.items():
        ours = [name for name in every if answers[name] == NOTHING + reason]
        used = [pattern for pattern in patterns.split() if any(matches(name, pattern) for name in ours)]
        if used:
            yield f"| {', '.join(f'`{pattern}`' for pattern in used)} | {reason} |"


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of the table is meant for a name, or for its end."""
    parts = name.lower().split(".")
    return any(fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def recipe(trainer: str, text: str) -> str:
    """What `gruppo convert` makes of an example, up to what it ignored."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILES[trainer])
        path.write_text(text, encoding="utf-8")
        converted = convert([str(path)]).recipe.replace(str(path), path.name)
    return converted.partition("\n# Ignored without harm:")[0].rstrip() + "\n"


def page() -> str:
    """The page with up-to-date tables and recipes."""
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(
        r"(<!-- example: (\w+) -->\n```\w+\n(.*?)```\n\n```toml\n).*?(```\n)",
        lambda match: f"{match[1]}{recipe(match[2], match[3])}{match[4]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- names: (\w+) -->\n).*?(<!-- end of names -->)",
        lambda match: "\n".join([match[1], *tables(match[2]), "", match[3]]),
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
