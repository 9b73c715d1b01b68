"""Recipes: reading, writing, and the message for each mistake."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.schema import TABLES
from gruppo.config.sections import Section

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


def test_file_name_that_is_not_a_run_name_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "my recipe (2).toml"
    path.write_text('\ufeff[model]\nname = "m"\n', encoding="utf-8")
    assert load_recipe(path).run.name == "my-recipe-2"


@pytest.mark.parametrize(
    ("override", "is_set"),
    [
        ("run.steps=7", lambda recipe: recipe.run.steps == 7),
        ("optimizer.learning_rate=1e-5", lambda recipe: recipe.optimizer.learning_rate == 1e-5),
        ("model.name=some/model", lambda recipe: recipe.model.name == "some/model"),
        ('reward.functions=["last_number", "exact_match"]', lambda recipe: len(recipe.reward.functions) == 2),
        ("task.options.maximum=9", lambda recipe: recipe.task.options == {"maximum": 9}),
        ("method.kl_coef=0", lambda recipe: recipe.method.kl_coef == 0),
        ("evaluation.questions=5", lambda recipe: recipe.evaluation.questions == 5),
    ],
)
def test_overrides(override: str, is_set) -> None:
    assert is_set(load_recipe(MINIMAL, [override]))


def test_override_does_not_change_the_mapping_passed() -> None:
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
        (
            {"reward": {"functions": ["last_number"], "weights": [1.0, 2.0]}},
            ["reward.weights", "2 numbers for 1 functions"],
        ),
        ({"model": {"name": ""}}, ["model.name = ''"]),
        ({"model": 3}, ["model = 3", "must be a table"]),
        ({"evaluation": {"evry": 3}}, ["evaluation.evry = 3", '"every"']),
        ({"run": {"name": "../up"}}, ["run.name = '../up'"]),
    ],
)
def test_mistakes_name_field_value_and_fix(data: dict, words: list[str]) -> None:
    message = mistake({**MINIMAL, **data})
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_truncated_sampling_is_refused_with_the_reason(name: str) -> None:
    message = mistake({**MINIMAL, "sampling": {name: 0.9}})
    assert "full distribution" in message


def test_missing_model() -> None:
    assert "[model]: missing; write the table [model] with name = " in mistake({})


def test_each_mistake_has_its_own_line() -> None:
    message = mistake({**MINIMAL, "run": {"steps": 0, "sed": 1}})
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("override", ["steps=3", "run.steps", "=3", "run.=3"])
def test_malformed_override(override: str) -> None:
    assert "section.field=value" in mistake(MINIMAL, override)


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("num_generations=8", "sampling.group_size=8"),
        ("beta=0.1", "method.kl_coef=0.1"),
        ("steps=3", "run.steps=3"),
        ("fp16=true", "model.dtype=bfloat16"),
    ],
)
def test_override_without_a_table_is_answered_with_the_field(override: str, written: str) -> None:
    message = mistake(MINIMAL, override)
    assert message.startswith(f'overrides = ["{override}"]: must have the form section.field=value; ')
    assert f'write overrides = ["{written}"]' in message


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [("run.steps=3", 'overrides = ["run.steps=3"]'), ({"run.steps": 3}, "write a list"), ([3], "write a list")],
)
def test_overrides_that_are_no_list_of_texts(overrides, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(MINIMAL, overrides)
    assert fix in str(caught.value)


def test_a_close_name_is_suggested_only_if_it_is_close() -> None:
    assert "did you mean" not in mistake({**MINIMAL, "method": {"dtla": 1}})
    assert 'did you mean "dpo_beta"' in mistake({**MINIMAL, "method": {"dpobeta": 1}})


def test_unreadable_files_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    for path, word in ((broken, "not valid TOML"), (tmp_path / "none.toml", "no such recipe"), (tmp_path, "no such")):
        with pytest.raises(RecipeError, match=word) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)


def test_every_field_is_documented() -> None:
    for title, table in TABLES.items():
        for field, info in table.model_fields.items():
            assert info.description or issubclass(info.annotation, Section), f"{title} {field}"


def test_recipes_of_the_project_are_valid() -> None:
    found = sorted(Path("recipes").glob("*.toml"))
    assert found
    for path in found:
        assert load_recipe(path).run.name == path.stem


def write(folder: Path, **files: str) -> Path:
    """Write recipe files by name, with a model unless they extend another; return the path of the last."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text if "extends" in text else f'{text}\n[model]\nname = "m"\n')
    return folder / f"{name}.toml"


def test_extending_recipe_inherits_fields_it_does_not_set(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base='[run]\nname = "theirs"\nsteps = 7\nseed = 3\n[reward]\nfunctions = ["a", "b"]\n[task]\n'
        "options = {maximum = 9, negative = true}",
        mine='extends = "base.toml"\n[run]\nsteps = 8\n[reward]\nfunctions = ["c"]\n[task]\noptions.maximum = 5',
    )
    recipe = load_recipe(path, ["run.seed=4"])
    assert (recipe.run.name, recipe.run.steps, recipe.run.seed) == ("mine", 8, 4)
    assert recipe.model.name == "m"
    assert recipe.reward.functions == ["c"], "a list replaces a list"
    assert recipe.task.options == {"maximum": 5, "negative": True}
    assert "extends" not in recipe.to_toml()
    assert load_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_extends_is_resolved_relative_to_each_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", lowest="[run]\nsteps = 5\nseed = 5", middle='extends = "lowest.toml"\n[run]\nsteps = 6')
    recipe = load_recipe(write(tmp_path, top='extends = "deep/middle.toml"\n[sampling]\ngroup_size = 2'))
    assert (recipe.run.name, recipe.run.seed, recipe.run.steps, recipe.sampling.group_size) == ("top", 5, 6, 2)
    other = load_recipe(write(tmp_path, far=f'extends = "{tmp_path}/deep/lowest.toml"\n[run]\nname = "x"'))
    assert (other.run.name, other.run.steps) == ("x", 5)


def test_mapping_extends_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, base='[run]\nname = "base"\nsteps = 7')
    monkeypatch.chdir(tmp_path)
    data = {"extends": "base.toml", "run": {"seed": 1}}
    recipe = load_recipe(data)
    assert (recipe.run.name, recipe.run.steps, recipe.run.seed) == ("run", 7, 1)
    assert data["extends"] == "base.toml"


def test_task_and_mixture_replace_each_other(tmp_path: Path) -> None:
    one = write(
        tmp_path, base="[task]\noptions = {maximum = 5}", mixed='extends = "base.toml"\n[[mixture]]\nweight = 2.0'
    )
    assert [task.weight for task in load_recipe(one).tasks] == [2.0]
    back = write(tmp_path, again='extends = "mixed.toml"\n[task]\nname = "x.jsonl"')
    assert [task.name for task in load_recipe(back).tasks] == ["x.jsonl"]
    assert load_recipe(back).task.options == {}, "a task that a mixture replaced does not come back"
    both = write(tmp_path, both='extends = "base.toml"\n[task]\n[[mixture]]\n')
    with pytest.raises(RecipeError, match="both define the source of prompts"):
        load_recipe(both)


def test_method_of_the_extending_recipe_fills_fields_that_neither_sets(tmp_path: Path) -> None:
    path = write(tmp_path, base="[method]\nclip_high = 0.3", mine='extends = "base.toml"\n[method]\nname = "dapo"')
    method = load_recipe(path).method
    assert (method.clip_high, method.dynamic_sampling_rounds, method.kl_coef) == (0.3, 9, 0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends = 3", ["mine.toml: extends = 3", "path of a recipe"]),
        ('extends = ["base.toml"]', ["mine.toml: extends = ['base.toml']", "path of a recipe"]),
        ('extends = "none.toml"', ["mine.toml: extends", '"none.toml"', "there is no file"]),
        ('extends = "mine.toml"', ["mine.toml: extends", "leads back"]),
        ('extends = "circle.toml"', ["circle.toml: extends", "leads back"]),
        ('extends = "base.toml"\n[run]\nsteps = 0', ["mine.toml: run.steps = 0"]),
        ('extends = "wrong.toml"\n[run]\nseed = 1', ["wrong.toml: run.steps = 0"]),
        ('extends = "broken.toml"', ["broken.toml: not valid TOML"]),
    ],
)
def test_mistakes_in_extends_name_file_and_key(text: str, words: list[str], tmp_path: Path) -> None:
    write(tmp_path, base="", circle='extends = "mine.toml"', wrong="[run]\nsteps = 0", broken="[run")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, mine=text))
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_replacing_reward_functions_drops_the_options_of_the_old_ones(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text('[model]\nname = "m"\n[reward]\nfunctions = ["regex", "last_number"]\n'
                    '[reward.options.regex]\npattern = "x"\n')  # fmt: skip
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n[reward]\nfunctions = ["last_number"]\n')
    for recipe in (load_recipe(tmp_path / "child.toml"), load_recipe(base, ['reward.functions=["last_number"]'])):
        assert (recipe.reward.functions, recipe.reward.options) == (["last_number"], {})


def test_overrides_of_names_with_dots_and_in_a_mixture() -> None:
    data = {**MINIMAL, "reward": {"functions": ["my.py:f"]}}
    recipe = load_recipe(data, ['reward.options."my.py:f".word="a=b"'])
    assert recipe.reward.options == {"my.py:f": {"word": "a=b"}}
    mixed = {**MINIMAL, "mixture": [{"name": "arithmetic"}, {"name": "x.jsonl"}]}
    assert load_recipe(mixed, ["task.name=arithmetic"]).mixture == []
    assert "written in the recipe" not in mistake(mixed, "mixture.0.weight=2")
    assert "mixture" in mistake(mixed, "mixture.0.weight=2")


LAGGED = {"cluster": {"lag": 1}, "method": {"tis_cap": 2.0}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {}}, ["cluster.lag = 1", "up to 1 steps before", "write method.tis_cap = 2.0, or lag = 0"]),
        (
            {"method": {"old_logprobs": "engine"}},
            ['write method.tis_cap = 2.0 and old_logprobs = "trainer", or lag = 0'],
        ),
        ({"method": {"name": "rft"}}, ['method.source = "initial"', "write lag = 0"]),
        ({"method": {"name": "sft"}}, ['method.source = "dataset"', "write lag = 0"]),
        (
            {"run": {"iterations": 2}, "reward_model": {"prompts": 4}},
            ["run.iterations = 2", "or reward_model.prompts = 0"],
        ),
        (
            {"cluster": {"lag": 1, "trainers": 2}, "reward_model": {"prompts": 0}},
            ["cluster.trainers = 2", "write lag = 0, or trainers = 1"],
        ),
        ({"model": {"name": "m", "lora": {"base": "4bit"}}}, ['model.lora.base = "4bit"', 'write base = "full"']),
        ({"cluster": {"lag": -1}}, ["cluster.lag", "0"]),
    ],
)
def test_what_a_lag_cannot_do(changes: dict, words: list[str]) -> None:
    message = mistake({**MINIMAL, **LAGGED, **changes})
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run": {"iterations": 2}},
        {"reward_model": {"prompts": 4}},
        {"reward_model": {"prompts": 0}, "run": {"iterations": 2}},
        {"engine": {"name": "vllm"}},
        {"cluster": {"lag": 1, "trainers": 2}},
        {"method": {"name": "ppo", "tis_cap": 2.0}},
        {"method": {"name": "dapo", "tis_cap": 2.0}},
    ],
)
def test_what_a_lag_can_do(changes: dict) -> None:
    assert load_recipe({**MINIMAL, **LAGGED, **changes}).lag == 1


def test_one_trainer_is_a_single_process() -> None:
    """What several ranks cannot do is no mistake then."""
    alone = {"cluster": {"trainers": 1}, "engine": {"name": "vllm"}, "optimizer": {"state": "8bit"}}
    assert load_recipe({**MINIMAL, **alone}).lag == 0
    assert 'engine.name = "vllm"' in mistake({**MINIMAL, **alone, "cluster": {"trainers": 2}})
