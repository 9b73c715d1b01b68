"""The recipes that come with gruppo: by name from anywhere, listed, copied, and extended."""

from __future__ import annotations

from pathlib import Path

import pytest

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.packaged import as_copy, described, packaged_recipes, recipe_path


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_recipe_loads_by_name_and_as_a_copy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert recipe.run.name == name
    (tmp_path / f"{name}.toml").write_text(as_copy(packaged_recipes()[name]))
    assert load_recipe(f"{name}.toml") == recipe
    assert len(described(packaged_recipes()[name])) > 20
    assert "schema" not in as_copy(packaged_recipes()[name])


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").mkdir()
    assert recipe_path("dpo") == packaged_recipes()["dpo"]
    (tmp_path / "sft").write_text('extends = "quickstart"\n[run]\nsteps = 77\n')
    assert load_recipe("sft").run.steps == 77
    (tmp_path / "quickstart").write_text("[run]\nsteps = 78\n[model]\nname = 'smollm2-135m-instruct'\n")
    (tmp_path / "mine.toml").write_text('extends = "quickstart"\n[task]\nname = "arithmetic"\n')
    assert load_recipe("mine.toml").run.steps == 78


def test_an_unknown_name_says_where_the_names_are() -> None:
    with pytest.raises(RecipeError, match="`gruppo recipes` lists"):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match="`gruppo recipes` lists"):
        load_recipe({"extends": "quikstart"})
