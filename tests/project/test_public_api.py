"""The public API of `import gruppo`, as an interactive user sees it."""

from __future__ import annotations

import pydoc
import subprocess
import sys

import pytest

import gruppo
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Evaluation, Section

TABLES = {
    "Audit", "Benchmark", "Cluster", "Critic", "Decoding", "EngineTable", "EnvironmentTable", "Evaluation", "Lora",
    "Method", "Model", "Optimizer", "Reward", "RewardModel", "Run", "Sampling", "Task",
}  # fmt: skip
PUBLIC = TABLES | {
    "Callback", "Environment", "Recipe", "RunError", "STOP", "StopTraining", "Turn", "UsageError", "evaluate", "export",
    "label", "load_recipe", "load_result", "reproduce", "rescore", "Result", "train", "train_reward_model",
}  # fmt: skip


def test_dir_is_the_public_api_in_a_fresh_interpreter() -> None:
    code = (
        "import gruppo, sys; print(*(n for n in dir(gruppo) if not n.startswith('_'))); "
        "assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(printed) == PUBLIC


def test_every_public_name_has_a_docstring() -> None:
    for name in PUBLIC - {"STOP"}:
        assert getattr(gruppo, name).__doc__, name


def test_the_tables_of_a_recipe_are_the_exported_classes() -> None:
    """Every table of the recipe can be written with a class that `gruppo` exports."""
    exported = {getattr(gruppo, name) for name in TABLES}
    assert exported == set(Section.__subclasses__()) - {Recipe} | set(Evaluation.__subclasses__())
    recipe = Recipe(
        model=gruppo.Model(name="m", lora=gruppo.Lora(rank=4)),
        run=gruppo.Run(steps=3),
        environment=gruppo.EnvironmentTable(name="python"),
        evaluation=gruppo.Evaluation(task=gruppo.Task(name="gsm8k"), decoding=gruppo.Decoding(top_k=5)),
    )
    assert gruppo.load_recipe(recipe) == recipe


def test_help_lists_the_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(gruppo))
    for name in ("train", "evaluate", "load_result", "export", "reproduce", "rescore", "label", "train_reward_model"):
        assert name in text
    assert "train(" in text  # the signature, not only the overview


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="trian"):
        gruppo.trian  # noqa: B018


def test_old_names_still_work_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="gruppo.reproduce"):
        assert gruppo.replay is gruppo.reproduce
