"""The recipe's schema, page and annotated form agree with the committed files and with the recipe reader."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.schema import TABLES, annotated, json_schema, markdown

RECIPES = sorted(Path("recipes").glob("*.toml"))


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "recipe") -> list[str]:
    """Validate the subset of JSON schema that the recipe uses: types, enumerations, lower bounds, tables and keys."""
    schema = {**schema, **root["definitions"][schema["$ref"].rpartition("/")[2]]} if "$ref" in schema else schema
    if "anyOf" in schema:
        found = [problems(value, option, root, where) for option in schema["anyOf"]]
        return [] if [] in found else found[0]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{where}: {value!r} is not of type {schema['type']}"]
    if "const" in schema and value != schema["const"]:
        return [f"{where}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is not one of {schema['enum']}"]
    if "minimum" in schema and value < schema["minimum"]:
        return [f"{where}: {value!r} is less than {schema['minimum']}"]
    if isinstance(value, list):
        return [problem for item in value for problem in problems(item, schema["items"], root, where)]
    if not isinstance(value, dict):
        return []
    found = [f"{where}: {key} is missing" for key in schema.get("required", []) if key not in value]
    for key, item in value.items():
        if key in schema.get("properties", {}):
            found += problems(item, schema["properties"][key], root, f"{where}.{key}")
        elif schema.get("additionalProperties") is False:
            found.append(f"{where}: {key} is unknown")
    return found


def check(recipe: dict[str, Any]) -> list[str]:
    schema = json_schema()
    found = problems(recipe, schema, schema)
    if "extends" not in recipe:
        missing = [key for key in schema["then"]["required"] if key not in recipe]
        inner = schema["then"]["properties"]["model"]["required"]
        found += [f"{key} is missing" for key in missing or [k for k in inner if k not in recipe["model"]]]
    return found


def test_committed_schema_and_page_equal_the_commands_output() -> None:
    assert json.loads(Path("gruppo/recipes/schema.json").read_text()) == json_schema(), (
        "gruppo schema > gruppo/recipes/schema.json"
    )
    assert Path("docs/recipe.md").read_text() == markdown(), "gruppo schema --markdown > docs/recipe.md"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_name_the_schema_and_satisfy_it(path: Path) -> None:
    assert path.read_text().startswith("#:schema schema.json\n")
    assert check(tomllib.loads(path.read_text())) == []


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ({"model": {"name": "m"}, "method": {"kl_coeff": 0.1}}, "kl_coeff is unknown"),
        ({"model": {"name": "m"}, "run": {"steps": 0}}, "less than 1"),
        ({"model": {"name": "m"}, "optimizer": {"schedule": "cosin"}}, "not one of"),
        ({"model": {}}, "name is missing"),
        ({"model": {"name": "m", "lora": {"rank": 0}}}, "less than 1"),
        ({"model": {"name": "m", "lora": {"targets": "all"}}}, "is not 'all-linear'"),
        ({}, "model is missing"),
    ],
)
def test_schema_refuses_what_the_recipe_reader_refuses(recipe: dict[str, Any], word: str) -> None:
    assert any(word in problem for problem in check(recipe))
    with pytest.raises(RecipeError):
        load_recipe(recipe)


def test_schema_accepts_what_the_recipe_reader_accepts() -> None:
    for recipe in (
        {"extends": "other.toml", "model": {"device": "cpu"}},
        {"model": {"name": "m"}, "evaluation": {"task": "arithmetic"}},
        {"model": {"name": "m", "lora": {"rank": 8, "targets": "all-linear"}}},
        {"model": {"name": "m", "lora": {"alpha": 8, "targets": ["q_proj"]}}},
        {"model": {"name": "m"}, "evaluation": {"task": {"name": "arithmetic", "options": {"maximum": 9}}}},
        {"model": {"name": "m"}, "mixture": [{"weight": 2.0}], "optimizer": {"learning_rate": 1}},
    ):
        assert check(recipe) == []


def test_schema_and_page_have_every_field() -> None:
    schema, page = json_schema(), markdown()
    for table in TABLES.values():
        definition = schema["definitions"][table.__name__]
        assert definition["properties"].keys() == table.model_fields.keys()
        assert definition["additionalProperties"] is False
        for name, field in definition["properties"].items():
            assert field.get("description") or "$ref" in field
            assert f"| `{name}` |" in page or "$ref" in field
    assert set(json_schema()["properties"]) == {"extends", *Recipe.model_fields}
    assert "null" not in json.dumps(schema)


def test_fields_stay_few() -> None:
    """About sixty-seven for GRPO and its variants, eleven for the methods it is compared with, five for their value
    model, nineteen for reward models, outer iterations and the audit, nine for environments, two for chat templates,
    three for engines in the process of the run and four for those outside of it, three for ranks, one for reward
    hosts, one for sampling ahead, three for the memory of rows, for inheritance in evaluation and for the held-out rows
    of earlier versions, four for attention and memory on an accelerator, and one for the noise of the gradient."""
    assert int(markdown().split(" fields;")[0].split()[-1]) <= 139


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluation": {"task": "x.jsonl", "decoding": {"stop": ["a", "b\n"]}}},
        {"mixture": [{"name": "a.jsonl", "options": {"deep": {"list": [1, {"x": 2}]}}}, {"name": "b.jsonl"}]},
        {
            "task": {"system": 'say "x"\nand\ty', "columns": {"a b": "c.d"}},
            "reward": {"options": {"f.py:g": {"k": 1.5}}},
        },
        {"model": {"name": "m", "lora": {"targets": ["q_proj"]}}},
        {"method": {"name": "rloo"}, "reward": {"functions": ["a", "b"], "weights": [1.0, 1e-9]}},
    ],
)
def test_annotated_recipe_reads_back_equal(changes: dict[str, Any]) -> None:
    recipe = load_recipe({"model": {"name": "m"}, **changes})
    text = annotated(recipe)
    assert load_recipe(tomllib.loads(text)) == recipe
    for line in text.splitlines():
        assert len(line) <= 100 or not line.startswith("#")


def test_annotated_recipe_shows_every_field_and_unset_tables() -> None:
    tables = {"evaluation": {}, "reward_model": {}, "audit": {"function": "last_number"}, "cluster": {}}
    text = annotated(load_recipe({"model": {"name": "m", "lora": {}}, **tables}))
    text += annotated(load_recipe({"model": {"name": "m"}, "environment": {"name": "python"}}))
    for title, table in TABLES.items():
        assert f"{title.split(', ')[0]}\n" in text
        for name in table.model_fields:
            assert f"\n{name} = " in text or f"\n# {name} = …" in text or f".{name}]" in text
    bare = annotated(load_recipe({"model": {"name": "m"}}))
    assert "# [evaluation]\n" in bare
    assert "# [reward_model]\n" in bare
    assert "# [model.lora]\n" in bare
