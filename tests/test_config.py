"""Recipes: what is read, what is written, and what each mistake is told."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gruppo.config import Recipe, RecipeError, load_recipe

MINIMAL = {"model": {"name": "m"}}


def mistake(data: dict, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(data, overrides)
    return str(caught.value)


def test_resolved_recipe_reads_back_equal() -> None:
    recipe = load_recipe({**MINIMAL, "evaluation": {"questions": 7}, "task": {"options": {"maximum": 9}}})
    assert load_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_name_comes_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nname = "m"\n')
    assert load_recipe(path).run.name == "mine"


def test_file_name_that_is_no_run_name_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "my recipe (2).toml"
    path.write_text('\ufeff[model]\nname = "m"\n', encoding="utf-8")
    assert load_recipe(path).run.name == "my-recipe-2"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("run.steps=7", lambda recipe: recipe.run.steps == 7),
        ("optimizer.learning_rate=1e-5", lambda recipe: recipe.optimizer.learning_rate == 1e-5),
        ("model.name=some/model", lambda recipe: recipe.model.name == "some/model"),
        ('reward.functions=["number", "exact_match"]', lambda recipe: len(recipe.reward.functions) == 2),
        ("task.options.maximum=9", lambda recipe: recipe.task.options == {"maximum": 9}),
        ("method.kl_coef=0", lambda recipe: recipe.method.kl_coef == 0),
        ("evaluation.questions=5", lambda recipe: recipe.evaluation.questions == 5),
    ],
)
def test_overrides(override: str, read) -> None:
    assert read(load_recipe(MINIMAL, [override]))


def test_override_does_not_change_the_mapping_given() -> None:
    data = {"model": {"name": "m"}}
    load_recipe(data, ["model.name=other"])
    assert data == {"model": {"name": "m"}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"method": {"kl_coeff": 0.1}}, ["method.kl_coeff = 0.1", "unknown field", '"kl_coef"']),
        ({"metod": {}}, ["metod", "unknown table", '"method"']),
        ({"run": {"steps": "ten"}}, ["run.steps = 'ten'", "integer", "steps = 100"]),
        ({"run": {"steps": "10"}}, ["run.steps = '10'", "integer"]),
        ({"run": {"steps": 0}}, ["run.steps = 0", "greater than or equal to 1"]),
        ({"run": {"steps": True}}, ["run.steps = True", "integer"]),
        ({"method": {"clip_low": 1.5}}, ["method.clip_low = 1.5", "less than or equal to 1"]),
        ({"method": {"kl_estimator": "k4"}}, ["method.kl_estimator = 'k4'", "'k1', 'k2' or 'k3'"]),
        ({"sampling": {"temperature": 0.0}}, ["sampling.temperature = 0.0", "greater than 0"]),
        ({"sampling": {"temperature": float("nan")}}, ["sampling.temperature", "finite"]),
        ({"optimizer": {"learning_rate": -1.0}}, ["optimizer.learning_rate = -1.0"]),
        ({"optimizer": {"schedule": "cosin"}}, ["optimizer.schedule = 'cosin'", "'cosine'"]),
        ({"optimizer": {"warmup_steps": 200}}, ["optimizer.warmup_steps = 200", "run.steps = 100"]),
        ({"reward": {"functions": ["number"], "weights": [1.0, 2.0]}}, ["reward.weights", "2 numbers for 1 functions"]),
        ({"model": {"name": ""}}, ["model.name = ''"]),
        ({"model": 3}, ["model = 3", "must be a table"]),
        ({"evaluation": {"evry": 3}}, ["evaluation.evry = 3", '"every"']),
        ({"run": {"name": "../up"}}, ["run.name = '../up'"]),
    ],
)
def test_each_mistake_names_field_value_and_fix(data: dict, words: list[str]) -> None:
    message = mistake({**MINIMAL, **data})
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_truncated_sampling_is_refused_with_the_reason(name: str) -> None:
    message = mistake({**MINIMAL, "sampling": {name: 0.9}})
    assert "full distribution" in message


def test_missing_model() -> None:
    assert "model: missing" in mistake({})


def test_every_mistake_has_its_line() -> None:
    message = mistake({**MINIMAL, "run": {"steps": 0, "sed": 1}})
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("override", ["steps=3", "run.steps", "=3", "run.=3"])
def test_malformed_override(override: str) -> None:
    assert "section.field=value" in mistake(MINIMAL, override)


def test_unreadable_files_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    for path, word in ((broken, "not valid TOML"), (tmp_path / "none.toml", "no such recipe"), (tmp_path, "no such")):
        with pytest.raises(RecipeError, match=word) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)


def test_every_field_is_documented() -> None:
    for name, section in Recipe.model_fields.items():
        if name == "mixture":
            continue  # tables like task
        annotation = section.annotation if name != "evaluation" else type(load_recipe({**MINIMAL, name: {}}).evaluation)
        for field, info in annotation.model_fields.items():
            assert info.description, f"{name}.{field}"


def test_recipes_of_the_project_are_valid() -> None:
    found = sorted(Path("recipes").glob("*.toml"))
    assert found
    for path in found:
        assert load_recipe(path).run.name == path.stem
