"""Length and warm-up: run.epochs beside run.steps, and optimizer.warmup_ratio beside optimizer.warmup_steps."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.schedule import learning_rate, warmup_steps
from gruppo.config.schema import annotated
from gruppo.config.sections import Optimizer
from gruppo.errors import UsageError


def loaded(*overrides: str, **tables: Any) -> Recipe:
    return load_recipe({"model": {"name": "m"}, **tables}, overrides)


@pytest.mark.parametrize(
    ("epochs", "prompts", "size", "iterations", "steps"),
    [
        (1, 100, 10, 1, 10), (1, 101, 10, 1, 11), (2, 101, 10, 1, 21), (0.5, 100, 10, 1, 5), (0.001, 100, 10, 1, 1),
        (3, 7, 16, 1, 2), (1, 100, 10, 3, 12), (1, 90, 10, 3, 9), (1.1, 30, 3, 1, 11), (0.1, 300, 10, 1, 3),
    ],
)  # fmt: skip
def test_steps_of_epochs(epochs: float, prompts: int, size: int, iterations: int, steps: int) -> None:
    recipe = loaded(run={"epochs": epochs, "iterations": iterations}, sampling={"prompts_per_step": size})
    resolved = recipe.with_steps(prompts)
    assert (resolved.run.steps, resolved.run.epochs) == (steps, None)
    assert load_recipe(resolved) == resolved


def test_a_recipe_has_either_steps_or_epochs() -> None:
    with pytest.raises(UsageError, match=r"run.epochs = 2.0: takes the place of steps = 9; write only one"):
        loaded(run={"epochs": 2.0, "steps": 9})
    assert loaded("run.epochs=2", run={"steps": 9}).run.epochs == 2
    again = loaded("run.steps=9", run={"epochs": 2.0})
    assert (again.run.steps, again.run.epochs) == (9, None)
    for number in ("0", "-1", "inf", "nan", '"2"'):
        with pytest.raises(UsageError, match=r"run\.epochs"):
            loaded(f"run.epochs={number}")


def test_other_fields_are_checked_with_the_steps_of_the_epochs() -> None:
    recipe = loaded(run={"epochs": 1}, optimizer={"warmup_steps": 200})  # 100 steps would refuse it
    assert recipe.with_steps(16 * 200).run.steps == 200
    with pytest.raises(ValueError, match=r"warmup_steps = 200: must be at most run\.steps = 10"):
        recipe.with_steps(160)


@pytest.mark.parametrize("table", ["run", "optimizer"])
def test_a_replaced_field_is_not_shown(table: str) -> None:
    recipe = loaded(run={"epochs": 2.0}, optimizer={"warmup_ratio": 0.1})
    assert not {"steps", "warmup_steps"} & set(recipe.as_mapping()[table])
    assert load_recipe(recipe) == recipe
    text = annotated(recipe)
    assert "# steps = …" in text
    assert "# warmup_steps = …" in text


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"),
    [(0.0, 100, 0), (0.1, 30, 3), (0.1, 31, 4), (0.03, 100, 3), (0.07, 100, 7), (0.999, 10, 10), (0.001, 10, 1)],
)
def test_warm_up_as_a_ratio(ratio: float, steps: int, warmup: int) -> None:
    """Rounded up, without the errors of binary fractions: 0.1 × 30 and 0.07 × 100 are whole numbers."""
    settings = Optimizer(learning_rate=1.0, warmup_ratio=ratio, schedule="cosine")
    assert warmup_steps(settings, steps) == warmup
    same = Optimizer(learning_rate=1.0, warmup_steps=warmup, schedule="cosine")
    rates = [[learning_rate(one, step, steps) for step in range(steps)] for one in (settings, same)]
    assert rates[0] == rates[1]
    assert min(rates[0]) > 0


def test_warm_up_is_given_in_one_way() -> None:
    with pytest.raises(UsageError, match=r"optimizer.warmup_ratio = 0.1: takes the place of warmup_steps = 0"):
        loaded(optimizer={"warmup_ratio": 0.1, "warmup_steps": 0})
    assert loaded("optimizer.warmup_ratio=0.1", optimizer={"warmup_steps": 5}).optimizer.warmup_ratio == 0.1
    for number in ("1", "-0.1", "1.5"):
        with pytest.raises(UsageError, match=r"optimizer\.warmup_ratio"):
            loaded(f"optimizer.warmup_ratio={number}")
