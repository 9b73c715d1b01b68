"""Reading a recipe: TOML files, `extends`, overrides, and messages for what is wrong with it."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gruppo.config.recipe import Recipe
from gruppo.config.renames import new_field, new_value, translate_recipe
from gruppo.config.sections import Section
from gruppo.errors import UsageError, nearest, one_line
from gruppo.utils.paths import is_file, user_path


class RecipeError(UsageError):
    """A recipe that cannot be run; the message names file, field, value and fix, a line for each."""

    def __init__(self, *mistakes: object) -> None:
        ValueError.__init__(self, "\n".join(map(one_line, mistakes)))


# Fields that users of other trainers will look for, with the reason why they are not here.
_REFUSED = {
    ("sampling", name): "training samples from the full distribution, so that π_old is what was drawn from; "
    f"{name} exists in `gruppo sample` and evaluation only. Remove it, or use temperature"
    for name in ("top_p", "top_k", "min_p")
} | {
    ("model", "dropout"): "there is none on adapters, so that what samples and what is trained is one distribution; "
    "remove it",
    ("method", "micro_batch_size"): "the micro-batch is derived from memory and never changes a result; remove it",
}


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, a mapping or a Recipe, change it by "section.field=value", and validate it.

    A file or mapping that says `extends = "other.toml"` (relative to the file; for a mapping, to the working directory)
    is laid over that recipe: tables field by field, everything else whole. A [task] replaces a [[mixture]] below it and
    a [[mixture]] a [task]; run.name is never taken over. A value of an override is read as TOML, and as plain text
    where it is none. Raises RecipeError with a line for each mistake: file, field, value, and what to write instead.
    """
    files = _read(source)
    where, data = files[0][0], _laid_over([data for _, data in files])
    for override in overrides:
        data = _override(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{_writer(files, details['loc'])}: {_explain(details)}" for details in error.errors()]
        raise RecipeError(*dict.fromkeys(lines)) from None
    try:
        recipe.to_toml().encode()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: options hold a value that TOML cannot write ({error}); use plain values") from None
    return recipe


_MOST_BYTES = 16 * 2**20


# The files that a recipe is made of, each by its name, from the one that was asked for to the last that is extended.
_Files = list[tuple[str, dict[str, Any]]]


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> _Files:
    if isinstance(source, Recipe):
        return [("recipe", source.as_mapping())]
    if isinstance(source, Mapping):
        if odd := [key for key in source if not isinstance(key, str)]:
            raise RecipeError(f"recipe: {odd[0]!r} is no name of a table; write text")
        files, folder, seen = [("recipe", copy.deepcopy(dict(source)))], Path(), []
    elif isinstance(source, str | Path):
        path = Path(source)
        data = _read_file(path)
        if (path.parent / "environment.json").is_file():  # of a run folder, which an older version may have made
            data = translate_recipe(data)
        files, folder, seen = [(str(path), data)], path.parent, [path.resolve()]
        if isinstance(run := files[0][1].setdefault("run", {}), dict):
            run.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run")
    else:
        raise RecipeError(f"recipe = {source!r}: neither a path, a mapping nor a Recipe; give one of them")
    while "extends" in files[-1][1]:
        where, data = files[-1]
        wanted = data.pop("extends")
        if not isinstance(wanted, str) or not wanted:
            raise RecipeError(f'{where}: extends = {wanted!r}: must be the path of a recipe; write e.g. "other.toml"')
        path = folder / user_path(wanted)
        if not is_file(path):
            raise RecipeError(f'{where}: extends = "{wanted}": there is no file {path}; give a path from {where}')
        if path.resolve() in seen:
            raise RecipeError(f'{where}: extends = "{wanted}": leads back to {path}; extend a recipe that stands alone')
        base = _read_file(path)
        if isinstance(run := base.get("run"), dict):
            run.pop("name", None)
        files.append((str(path), base))
        folder, seen = path.parent, [*seen, path.resolve()]
    return files


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise RecipeError(f"{path}: has more than {_MOST_BYTES / 2**20:.0f} MiB; give a recipe")
        return tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except RecipeError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"{path}: there is no such recipe file; give the path of a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}; mend that line") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error}); give a readable UTF-8 .toml file") from None


def _laid_over(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers as one, the first on top. Other reward functions come without the options of those before; a task
    takes the place of a mixture, and the other way round."""
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        if "mixture" in layer or "task" in layer:
            merged.pop("task" if "mixture" in layer else "mixture", None)
        reward, before = layer.get("reward"), merged.get("reward")
        if isinstance(reward, dict) and isinstance(before, dict) and "functions" in reward:
            merged["reward"] = _without_functions(before, reward["functions"])
        merged = _merged(merged, layer)
    return merged


def _without_functions(reward: Mapping[str, Any], functions: Any) -> dict[str, Any]:
    """A [reward] table whose functions are about to become others: without the options of those that go."""
    options = reward.get("options")
    if not isinstance(options, dict) or not isinstance(functions, list):
        return dict(reward)
    return {**reward, "options": {name: values for name, values in options.items() if name in functions}}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        held = merged.get(key)
        merged[key] = _merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def _writer(files: _Files, location: Sequence[str | int]) -> str:
    """The name of the file that wrote the field; the one that was asked for where none did."""

    def holds(data: Any) -> bool:
        for part in location:
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    return next((where for where, data in files if location and holds(data)), files[0][0])


def toml_value(text: str) -> Any:
    """A value as it would stand behind `=` in TOML; the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """The recipe with one field changed. The key is one of TOML, so that quotes hold a name with dots together."""
    form = f'--set {override}: not of the form section.field=value; write e.g. --set "run.steps=50"'
    key, equals, text = _split(override)
    try:
        layer: Any = tomllib.loads(f"{key} = 0")
    except ValueError:
        raise RecipeError(form) from None
    path: list[str] = []
    while isinstance(layer, dict) and len(layer) == 1:
        ((name, layer),) = layer.items()
        path.append(name)
    if not equals or len(path) < 2 or layer != 0:
        raise RecipeError(form)
    if path[0] in {"mixture", "benchmarks"}:
        raise RecipeError(f"--set {override}: tables of a list have no names; write them in the recipe")
    table: Any = data
    for part in path[:-1]:
        table = table.get(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {part} is not a table of the recipe; write section.field=value")
    value: Any = toml_value(text)
    for part in reversed(path):
        value = {part: value}
    return _laid_over([value, data])


def _split(override: str) -> tuple[str, str, str]:
    """Key, "=" and value; an "=" within quotes belongs to the key."""
    quoted = False
    for place, letter in enumerate(override):
        quoted ^= letter == '"'
        if letter == "=" and not quoted:
            return override[:place], "=", override[place + 1 :]
    return override, "", ""


def _explain(details: ErrorDetails) -> str:
    """One mistake as `field = value: what is wrong; what to write`."""
    location = [str(part) for part in details["loc"]] or ["recipe"]
    field, kind = re.sub(r"^(mixture|benchmarks)\.(\d+)", r"\1[\2]", ".".join(location)), details["type"]
    if kind == "extra_forbidden":
        if reason := _REFUSED.get((location[0], location[-1])):
            return f"{field} = {details['input']!r}: {reason}"
        if renamed := new_field(location[0], location[-1]):
            return f"{field} = {_short(details['input'])}: this field is called {location[0]}.{renamed} now; write that"
        section = _section(location[:-1])
        what = "field" if len(location) > 1 else "table"
        known = section.model_fields if section else []
        return f"{field} = {_short(details['input'])}: unknown {what}{nearest(location[-1], known)}"
    if kind == "missing":
        example = {"audit.function": "math_verify", "environment.name": "python"}.get(field, "smollm2-135m-instruct")
        return f'{field}: missing; write e.g. {location[-1]} = "{example}" in [{".".join(location[:-1])}]'
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return f"{field}.{message}" if details["loc"] else message
    if tables := next((name for name in ("mixture", "benchmarks") if location[0] == name and len(location) < 3), ""):
        return f"{field} = {_short(details['input'])}: must be tables; write [[{tables}]] and its fields below"
    if kind in {"model_type", "dict_type", "model_attributes_type"} and _section(location):
        return f"{field} = {_short(details['input'])}: must be a table; write [{field}] and its fields below"
    if renamed := new_value(location[0], location[-1], details["input"]):
        return f'{field} = {_short(details["input"])}: this is called "{renamed}" now; write that'
    text = details["msg"].removeprefix("Input ").replace("should", "must")
    return f"{field} = {_short(details['input'])}: {text}{_fix(location)}"


def _section(location: Sequence[str]) -> type[Section] | None:
    """The table at a place of the recipe."""
    section: type[Section] = Recipe
    for name in location:
        if name.isdecimal():
            continue  # a task of the mixture
        if name not in section.model_fields:
            return None
        annotation = section.model_fields[name].annotation
        kinds = [annotation, *get_args(annotation)]
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if found is None:
            return None
        section = found
    return section


def _fix(location: Sequence[str]) -> str:
    places = [place for place in range(len(location), 1, -1) if _section(location[: place - 1])]
    if not places:
        return ""
    section = _section(location[: places[0] - 1])
    name = location[places[0] - 1]
    if section is None or name not in section.model_fields:
        return "; write text as the name of a field"
    field = section.model_fields[name]
    if field.is_required() or not field.default:
        return f"; {field.description}"
    return f"; write e.g. {tomli_w.dumps({name: field.default}).strip()}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
