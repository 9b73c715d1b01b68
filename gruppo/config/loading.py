"""Loading a recipe: TOML files, `extends`, overrides and error messages."""

from __future__ import annotations

import copy
import difflib
import json
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gruppo.config.foreign_names import NOTHING, fields_named, gruppo_name
from gruppo.config.labels import options_name
from gruppo.config.packaged import packaged_recipes, recipe_path
from gruppo.config.recipe import Recipe
from gruppo.config.renames import new_field, new_value, translate_recipe
from gruppo.config.sections import Decoding, Lora, Optimizer, Run
from gruppo.errors import UsageError, nearest, worded
from gruppo.utils.nesting import MAX_DEPTH, too_deep
from gruppo.utils.paths import is_file, not_a_file, user_path
from gruppo.utils.renamed_modules import advice


class RecipeError(UsageError):
    """An invalid recipe. The message has one line per mistake: file, field, value and fix."""

    def __init__(self, *mistakes: object) -> None:
        ValueError.__init__(self, "\n".join(map(worded, mistakes)))


# Fields that users of other trainers may expect, with the reason why gruppo does not have them.
_REFUSED = {
    ("sampling", name): "training samples from the full distribution, so that π_old is the sampling distribution; "
    f"{name} exists only in `gruppo sample` and evaluation. Remove it, or use temperature"
    for name in ("top_p", "top_k", "min_p")
} | {
    (
        "model",
        "dropout",
    ): "adapters have no dropout, so that sampling and training use the same distribution; remove it",
    (
        "method",
        "micro_batch_size",
    ): "the micro-batch is derived from the available memory and never changes a result; remove it",
}


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a TOML file, a mapping or a Recipe, apply overrides ("section.field=value"), and validate it.

    A file or mapping with `extends = "other.toml"` (relative to the file; for a mapping, to the working directory)
    overrides that base recipe: tables field by field, other values as a whole. A [task] replaces a [[mixture]] of the
    base, and a [[mixture]] a [task]; run.name is never inherited. The value of an override is parsed as TOML, or taken
    as plain text if it is not valid TOML. Raises RecipeError with one line per mistake: file, field, value and fix.
    """
    files = _read(source)
    where, data = files[0][0], overlaid([data for _, data in files])
    for override in override_list(overrides):
        data = _override(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{_origin(files, details['loc'])}: {_explain(details)}" for details in error.errors()]
        raise RecipeError(*dict.fromkeys(lines)) from None
    try:
        recipe.to_toml().encode()
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{where}: the options contain a value that TOML cannot represent ({error}); use plain values"
        ) from None
    for place, text in _texts("", recipe.as_mapping()):
        if ":" in text and (hint := advice(text)):
            warnings.warn(f"{where}: {place} = {text!r}: {hint}", FutureWarning, stacklevel=2)
    return recipe


def _texts(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in nested tables and lists, with the name of its field."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(place, item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(f"{place}.{name}".removeprefix("."), item)


def recipe_mistakes(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with a recipe, given as tables: field and message of each mistake.

    The field is "" if the message concerns several of them.
    """
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        places = [details.get("ctx", {}).get("field") or details["loc"] for details in error.errors()]
        return [(".".join(map(str, place)), _explain(details)) for place, details in zip(places, error.errors())]
    return []


def without_unused_fields(data: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run folder without fields that have no effect, which earlier versions accepted."""
    while True:
        try:
            Recipe.model_validate(data)
        except ValidationError as error:
            unused = [details["ctx"]["field"] for details in error.errors() if details["type"] == "unused_field"]
            if not unused:
                return data
            table, field = unused[0]
            data = {**data, table: {name: value for name, value in data[table].items() if name != field}}
        else:
            return data


_MAX_BYTES = 16 * 2**20


# Names and contents of the files of a recipe: first the requested one, then the recipes that it extends, in order.
_Files = list[tuple[str, dict[str, Any]]]


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> _Files:
    if isinstance(source, Recipe):
        return [("recipe", source.as_mapping())]
    if isinstance(source, Mapping):
        if invalid := [key for key in source if not isinstance(key, str)]:
            raise RecipeError(f"recipe: {invalid[0]!r} is not the name of a table; use a string")
        files, folder, seen = [("recipe", copy.deepcopy(_require_flat(dict(source), "recipe")))], Path(), []
    elif isinstance(source, str | Path):
        path = recipe_path(source)
        data = _read_file(path)
        if (path.parent / "environment.json").is_file():  # a run folder, possibly written by an older version
            data = without_unused_fields(translate_recipe(data))
        files, folder, seen = [(str(path), data)], path.parent, [path.resolve()]
        if isinstance(run := files[0][1].setdefault("run", {}), dict):
            run.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run")
    else:
        raise RecipeError(f"recipe = {source!r}: must be a path, a mapping or a Recipe; pass one of them")
    while "extends" in files[-1][1]:
        where, data = files[-1]
        base_name = data.pop("extends")
        path = _base(where, folder, base_name)
        if path.resolve() in seen:
            raise RecipeError(
                f'{where}: extends = "{base_name}": leads back to {path}; extend a recipe that does not extend this one'
            )
        base = _read_file(path)
        if isinstance(run := base.get("run"), dict):
            run.pop("name", None)
        files.append((str(path), base))
        folder, seen = path.parent, [*seen, path.resolve()]
    return files


def _base(where: str, folder: Path, name: Any) -> Path:
    """The file of the recipe that the recipe `where` in `folder` extends."""
    if not isinstance(name, str) or not name:
        raise RecipeError(f'{where}: extends = {name!r}: must be the path of a recipe; write e.g. "other.toml"')
    path = folder / user_path(name)
    if not is_file(path) and name in packaged_recipes():
        return packaged_recipes()[name]
    if not is_file(path):
        raise RecipeError(
            f'{where}: extends = "{name}": there is no file {path}; give a path relative to {where}, or a name that '
            "`gruppo recipes` lists"
        )
    return path


def _read_file(path: Path) -> dict[str, Any]:
    if (found := not_a_file(path)) and found != "a folder":
        raise RecipeError(f"{path}: is {found}; write the recipe to a .toml file and give its path")
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise RecipeError(f"{path}: is larger than {_MAX_BYTES / 2**20:.0f} MiB; give the path of a recipe")
        return _require_flat(tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n")), str(path))
    except RecipeError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(
            f"{path}: there is no such recipe file; give the path of a .toml file, or a name that `gruppo "
            "recipes` lists"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}; fix that line") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error}); give a readable UTF-8 .toml file") from None


def _require_flat(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The tables of a recipe. Raises RecipeError if they are nested more than MAX_DEPTH levels deep."""
    if deep := next((name for name, value in data.items() if too_deep(value)), None):
        raise RecipeError(f"{where}: {deep}: is nested more than {MAX_DEPTH} levels deep; write section.field = value")
    return data


def overlaid(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers merged into one recipe; earlier layers override later ones.

    A layer that sets reward.functions drops the options of functions that it removes. A task replaces a mixture, and
    vice versa; run.steps and run.epochs replace each other, as do other fields of which only one may be set.
    """
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        for table, pairs in _ALTERNATIVES.items():
            above, below = layer.get(table), merged.get(table)
            if isinstance(above, dict) and isinstance(below, dict):
                gone = {other for new, old in pairs for one, other in ((new, old), (old, new)) if one in above}
                merged[table] = {name: value for name, value in below.items() if name not in gone}
        if "mixture" in layer or "task" in layer:
            merged.pop("task" if "mixture" in layer else "mixture", None)
        reward, before = layer.get("reward"), merged.get("reward")
        if isinstance(reward, dict) and isinstance(before, dict) and "functions" in reward:
            merged["reward"] = _without_functions(before, reward["functions"])
        merged = _merged(merged, layer)
    return merged


# Table -> pairs of fields of which only one may be set.
_ALTERNATIVES = {name: [*section.REPLACES.items()] for name, section in (("run", Run), ("optimizer", Optimizer))}


def _without_functions(reward: Mapping[str, Any], functions: Any) -> dict[str, Any]:
    """A [reward] table without the options of functions that are not in `functions`, its new list of functions."""
    options = reward.get("options")
    if not isinstance(options, dict) or not isinstance(functions, list):
        return dict(reward)
    names = {options_name(function) for function in functions if isinstance(function, str)}
    return {**reward, "options": {name: values for name, values in options.items() if name in names}}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _origin(files: _Files, location: Sequence[str | int]) -> str:
    """The name of the file that sets the field; the requested file if none does."""

    def contains(data: Any) -> bool:
        for part in location:
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    return next((where for where, data in files if location and contains(data)), files[0][0])


def toml_value(text: str) -> Any:
    """The text parsed as a TOML value, i.e. as written after `=`; the text itself if it is not valid TOML."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def override_list(overrides: Sequence[str]) -> list[str]:
    """The overrides as a list. Raises RecipeError unless they are one of texts."""
    if isinstance(overrides, str):
        raise RecipeError(f"overrides = {overrides!r}: must be a list; write overrides = {json.dumps([overrides])}")
    wrong = [one for one in overrides if not isinstance(one, str)] if isinstance(overrides, Sequence) else [overrides]
    if wrong:
        raise RecipeError(f'overrides: {wrong[0]!r} is not a text; write a list such as overrides = ["run.steps=50"]')
    return list(overrides)


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """The recipe with one field changed. The key follows TOML, so that a name with dots can be quoted."""
    form = f"--set {override}: must have the form section.field=value; "
    example = "write e.g. --set run.steps=50"
    key, equals, text = _split(override)
    try:
        layer: Any = _require_flat(tomllib.loads(f"{key} = 0"), f"--set {_short(override)}")
    except RecipeError:
        raise
    except (ValueError, RecursionError):
        raise RecipeError(form + example) from None
    path: list[str] = []
    while isinstance(layer, dict) and len(layer) == 1:
        ((name, layer),) = layer.items()
        path.append(name)
    if equals and len(path) == 1 and layer == 0 and (meant := as_override(path, text)):
        raise RecipeError(form + meant)
    if not equals or len(path) < 2 or layer != 0:
        raise RecipeError(form + example)
    if path[0] in {"mixture", "benchmarks"}:
        raise RecipeError(f"--set {override}: the tables of a list cannot be set by name; write them in the recipe")
    table: Any = data
    for part in path[:-1]:
        table = table.get(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {part} is not a table of the recipe; write section.field=value")
    value: Any = toml_value(text)
    for part in reversed(path):
        value = {part: value}
    return overlaid([_require_flat(value, f"--set {_short(override)}"), data])


def as_override(location: Sequence[str], text: str) -> str | None:
    """What to write for a field that was given without its table, or by its name in another trainer.

    `location`: its name, possibly after that of a table; `text`: its value, "" if there is none. None if the name is
    unknown.
    """
    location = [name.replace("-", "_") for name in location]
    found = fields_named(location, recipe_tables())
    meant = gruppo_name(location, toml_value(text)) or (found[0] if found else None)
    if meant is None:
        return None
    field = re.match(r"([a-z_]+(?:\.[a-z_]+)+)(?: = \"(\w+)\")?(?=$|[,;:] | \()", meant)
    if field is None:
        return _advice(meant, "it")
    return f"write --set {shlex.quote(f'{field[1]}={field[2] or text}')}{meant[field.end() :]}"


def _split(override: str) -> tuple[str, str, str]:
    """Key, "=" and value. An "=" inside quotes belongs to the key."""
    quoted = False
    for index, character in enumerate(override):
        quoted ^= character == '"'
        if character == "=" and not quoted:
            return override[:index], "=", override[index + 1 :]
    return override, "", ""


def _explain(details: ErrorDetails) -> str:
    """One mistake as `field = value: problem; fix`."""
    location = [str(part) for part in details["loc"]] or ["recipe"]
    field, kind = re.sub(r"^(mixture|benchmarks)\.(\d+)", r"\1[\2]", ".".join(location)), details["type"]
    if kind == "extra_forbidden":
        if reason := _REFUSED.get((location[0], location[-1])):
            return f"{field} = {details['input']!r}: {reason}"
        if renamed := new_field(location[0], location[-1]):
            return f"{field} = {_short(details['input'])}: this field was renamed; write {location[0]}.{renamed}"
        return _unknown(field, location, details["input"])
    if kind == "unused_field":
        return details["msg"]
    if location == ["optimizer", "warmup_steps"] and isinstance(details["input"], float):
        return f"{field} = {details['input']}: is a fraction; write warmup_ratio = {details['input']}"
    if kind == "missing":
        example = {"audit.function": "math_verify", "environment.name": "python"}.get(field, "smollm2-135m-instruct")
        if len(location) == 1:
            return f'[{field}]: missing; write the table [{field}] with name = "{example}", for example'
        return f'{field}: missing; write e.g. {location[-1]} = "{example}" in [{".".join(location[:-1])}]'
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return f"{field}.{message}" if details["loc"] else message
    if tables := next((name for name in ("mixture", "benchmarks") if location[0] == name and len(location) < 3), ""):
        return (
            f"{field} = {_short(details['input'])}: must be a list of tables; write [[{tables}]] with its fields below"
        )
    if kind in {"model_type", "dict_type", "model_attributes_type"} and _section(location):
        return f"{field} = {_short(details['input'])}: must be a table; write [{field}] with its fields below"
    if renamed := new_value(location[0], location[-1], details["input"]):
        return f'{field} = {_short(details["input"])}: this value was renamed; write "{renamed}"'
    return wrong_value(field, location, details)


def wrong_value(field: str, location: Sequence[str], details: ErrorDetails, root: type[BaseModel] = Recipe) -> str:
    """A value of the wrong type or range as `field = value: problem; fix`.

    `location`: the names of the tables of `root` that lead to the field, and its own.
    """
    text = details["msg"].removeprefix("Input ").replace("should", "must")
    return f"{field} = {_short(details['input'])}: {text}{_fix(location, details['input'], root)}"


def _unknown(field: str, location: Sequence[str], value: Any) -> str:
    """An unknown field or table, with the field that the user probably means."""
    section = _section(location[:-1])
    known = list(section.model_fields) if section else []
    what = "field" if len(location) > 1 or not isinstance(value, Mapping | list) else "table"
    problem = f"{field} = {_short(value)}: unknown {what}"
    if isinstance(value, Mapping) and (inner := _inner_names(location, value)):
        return f"{problem}; {'; '.join(inner)}"
    if table := _holding(location):
        return f"{problem}; write {field.rpartition('.')[0]}.{table}.{location[-1]}"
    if meant := gruppo_name(location, value):
        return f"{problem}; {_advice(meant, 'it')}"
    if difflib.get_close_matches(location[-1], known, n=1, cutoff=0.8):
        return f"{problem}{nearest(location[-1], known)}"
    if elsewhere := fields_named(location, recipe_tables()):
        return f"{problem}; write {' or '.join(elsewhere)}"
    return f"{problem}{nearest(location[-1], known)}"


def _advice(meant: str, name: str) -> str:
    """What to do with a field of another trainer called `name`, given the answer of `gruppo_name`."""
    return f"remove {name}: {meant.removeprefix(NOTHING)}" if meant.startswith(NOTHING) else f"write {meant}"


def _holding(location: Sequence[str]) -> str | None:
    """The table that has a field of this name, among those inside the table where it was found; e.g. "decoding"."""
    section = _section(location[:-1]) if len(location) > 1 else None
    for name in section.model_fields if section else ():
        inner = _section([*location[:-1], name])
        if inner is not None and location[-1] in inner.model_fields:
            return name
    return None


def recipe_tables() -> Iterator[tuple[str, list[str]]]:
    """The tables of a recipe with the names of their fields."""
    for name in sorted(Recipe.model_fields, key="critic reward_model".find):  # "optimizer.learning_rate" comes first
        if name not in {"mixture", "benchmarks"} and (section := _section([name])):
            yield name, list(section.model_fields)
    yield "model.lora", list(Lora.model_fields)
    yield "evaluation.decoding", list(Decoding.model_fields)


def _inner_names(location: Sequence[str], table: Mapping[str, Any]) -> list[str]:
    """Answers for the fields of another trainer in an unknown table, at any depth; at most eight."""
    answers: list[str] = []
    for name, value in table.items():
        path = [*location, str(name)]
        if isinstance(value, Mapping):
            answers += _inner_names(path, value)
        elif meant := gruppo_name(path, value):
            answers.append(_advice(meant, name) if meant.startswith(NOTHING) else f"for {name} write {meant}")
        elif elsewhere := fields_named(path, recipe_tables()):
            answers.append(f"for {name} write {' or '.join(elsewhere)}")
    return answers[:8]


def _section(location: Sequence[str], root: type[BaseModel] = Recipe) -> type[BaseModel] | None:
    """The table class at a location of the recipe, or of another file; None if there is none."""
    section = root
    for name in location:
        if name.isdecimal():
            continue  # an index, e.g. of a task in the mixture
        if name not in section.model_fields:
            return None
        annotation = section.model_fields[name].annotation
        types = [annotation, *get_args(annotation)]
        inner = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            return None
        section = inner
    return section


def _fix(location: Sequence[str], value: object, root: type[BaseModel]) -> str:
    """The fix for a value of the wrong type or range: an example, or the meaning of a field without a default."""
    depths = [depth for depth in range(len(location), 1, -1) if _section(location[: depth - 1], root)]
    if not depths:
        return ""
    section = _section(location[: depths[0] - 1], root)
    name = location[depths[0] - 1]
    if section is None or name not in section.model_fields:
        return "; use a string as the name of a field"
    field = section.model_fields[name]
    kind, example = str(field.annotation), field.default
    whole = depths[0] == len(location)  # not an item of a list
    if whole and kind.startswith(("list", "typing.Annotated[list")) and isinstance(value, str | int | float):
        return f"; write e.g. {name} = {json.dumps([value], ensure_ascii=False)}"
    if field.annotation is bool:
        example = str(value).lower() in ("true", "yes", "on", "1")
    if field.is_required() or example in (None, [], {}, ""):
        return f"; {field.description}"
    return f"; write e.g. {tomli_w.dumps({name: example}).strip()}"


def _short(value: object) -> str:
    """The value's repr, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
