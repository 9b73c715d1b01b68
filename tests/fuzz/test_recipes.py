"""Fuzz recipes: a valid one survives writing and reading; any other is refused with a clear message."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import tomli_w
from hypothesis import strategies as st

from gruppo.config.loading import load_recipe, toml_value
from gruppo.config.methods import METHODS
from gruppo.config.recipe import Recipe
from gruppo.config.schema import annotated
from gruppo.config.sections import Section
from gruppo.errors import UsageError
from gruppo.models.loading import find_model
from tests.fuzzing import ANY_TEXT, NUMBERS, TEXT, TOML_VALUES, clear, command, examples, said_clearly

QUICKSTART = Path("gruppo/recipes/quickstart.toml").read_text()


def sections(kind: type[Section] = Recipe, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], type[Section]]]:
    """Every table of a recipe with its path."""
    result = [(path, kind)]
    for name, field in kind.model_fields.items():
        types = [field.annotation, *get_args(field.annotation)]
        tables = [table for table in types if isinstance(table, type) and issubclass(table, Section)]
        result += [entry for table in tables for entry in sections(table, (*path, name))]
    return result


FIELDS = [(*path, name) for path, kind in sections() for name in kind.model_fields]
LIKELY = st.sampled_from([
    *METHODS, "group", "batch", "none", "indicator", "rows", "frozen", "live", "pair", "step", "value", "outcome",
    "process", "last_number", "math_verify", "6 GB", "all-linear", "auto", "float32", "k1", "k2", "k3", "sequence",
    "token-mean", ["last_number"], [1.0], ["last_number", "math_verify"], {"last_number": {}}, {"name": "arithmetic"},
    [{"name": "arithmetic"}],
])  # fmt: skip
VALUES = LIKELY | NUMBERS | st.booleans() | TOML_VALUES
KEYS = st.sampled_from(FIELDS) | st.tuples(st.sampled_from([path for path, _ in sections()]), TEXT).map(
    lambda pair: (*pair[0], pair[1])
)
CHANGES = st.lists(st.tuples(KEYS, VALUES), max_size=5)


def changed(changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {"model": {"name": "m"}}
    for path, value in changes:
        table: Any = data
        for part in path[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[path[-1]] = value
    return data


def read_again(recipe: Recipe) -> None:
    assert load_recipe(tomllib.loads(recipe.to_toml())) == recipe
    assert load_recipe(tomllib.loads(annotated(recipe))) == recipe


@examples(300, changes=CHANGES)
def test_recipes_with_any_fields(changes: list) -> None:
    with clear():
        read_again(load_recipe(changed(changes)))


@examples(60, data=st.dictionaries(ANY_TEXT | st.integers(), TOML_VALUES | st.none() | st.binary(), max_size=4))
def test_any_mapping_as_a_recipe(data: dict) -> None:
    with clear():
        read_again(load_recipe(data))


@examples(100, overrides=st.lists(
    ANY_TEXT | st.tuples(KEYS, ANY_TEXT | VALUES.map(repr)).map(lambda pair: ".".join(pair[0]) + "=" + pair[1]),
    max_size=3,
))  # fmt: skip
def test_any_overrides(overrides: list[str]) -> None:
    with clear():
        read_again(load_recipe({"model": {"name": "m"}}, overrides))


MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(QUICKSTART)), st.integers(0, 12), TEXT | st.sampled_from("[]=\"'#.{},\n")), max_size=4
)


def mutated(text: str, mutations: list[tuple[int, int, str]]) -> str:
    for place, count, new in mutations:
        text = text[:place] + new + text[place + count :]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@examples(60, mutations=MUTATIONS)
def test_mutated_files_on_the_command_line(folder: Path, mutations: list) -> None:
    path = folder / "mutated.toml"
    path.write_text(mutated(QUICKSTART, mutations), encoding="utf-8")
    code, out, err = command("train", str(path), "--show")
    said_clearly(code, err)
    if code == 0:
        assert load_recipe(tomllib.loads(out)) == load_recipe(path)


@examples(40, changes=CHANGES, overrides=st.lists(TEXT, max_size=2))
def test_recipes_with_any_fields_on_the_command_line(folder: Path, changes: list, overrides: list[str]) -> None:
    path = folder / "changed.toml"
    try:
        path.write_text(tomli_w.dumps(changed(changes)), encoding="utf-8")
    except (TypeError, ValueError, AttributeError):
        return  # cannot be written as TOML
    code, _, err = command(
        "train", str(path), "--show", *(part for override in overrides for part in ("--set", override))
    )
    said_clearly(code, err)


@examples(60, content=st.binary(max_size=60))
def test_any_bytes_as_a_recipe(folder: Path, content: bytes) -> None:
    path = folder / "bytes.toml"
    path.write_bytes(content)
    code, _, err = command("train", str(path), "--show")
    said_clearly(code, err)


@examples(60, text=ANY_TEXT)
def test_any_value_of_an_override(text: str) -> None:
    with clear():
        toml_value(text)


@examples(40, name=ANY_TEXT, extends=ANY_TEXT)
def test_any_recipe_path(folder: Path, name: str, extends: str) -> None:
    with clear():
        load_recipe(name)
    with clear():
        load_recipe({"extends": extends, "model": {"name": "m"}})
    with pytest.raises(UsageError):
        load_recipe({"extends": str(folder / "none.toml")})


@examples(60, name=ANY_TEXT | st.tuples(ANY_TEXT, st.sampled_from([".gguf", "/x", "--a", "/"])).map("".join))
def test_any_model_name(name: str) -> None:
    with clear(), mock.patch("gruppo.models.loading.hub_reachable", return_value=False):
        find_model(name)
