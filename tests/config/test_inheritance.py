"""Evaluation tasks inherit columns, template and system of the training task, and the resolved recipe shows them."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.config.inheritance import OWN_PROMPTS
from gruppo.config.loading import load_recipe
from gruppo.config.renames import translate_recipe
from gruppo.data.benchmark_table import BENCHMARKS
from gruppo.data.loading import TASKS

TASK = {"name": "train.jsonl", "columns": {"prompt": "q"}, "template": "{prompt}!", "system": "Think."}
ALL = (TASK["columns"], TASK["template"], TASK["system"])


def fields(task: Any) -> tuple[Any, ...]:
    return task.columns, task.template, task.system


def resolved(evaluation: Any, benchmark: Any = "b.jsonl", **tables: Any) -> tuple[Any, Any]:
    table = evaluation if isinstance(evaluation, dict) and "task" in evaluation else {"task": evaluation}
    data = {"model": {"name": "m"}, "task": TASK, "evaluation": table, "benchmarks": [{"task": benchmark}], **tables}
    recipe = load_recipe(data)
    assert load_recipe(recipe.as_mapping()) == recipe, "loading the resolved recipe again gives an equal recipe"
    assert translate_recipe(recipe.as_mapping()) == recipe.as_mapping()
    assert recipe.evaluation is not None
    return fields(recipe.evaluation.task), fields(recipe.benchmarks[0].task)


@pytest.mark.parametrize("task", ["e.jsonl", {"name": "e.jsonl"}, "owner/name", "my.module:load", "folder"])
def test_files_folders_datasets_and_functions_inherit_all(task: Any) -> None:
    assert resolved(task, task) == (ALL, ALL)


def test_what_is_written_stays() -> None:
    own = {"name": "e.jsonl", "columns": {}, "template": "{q}?", "system": ""}
    assert resolved(own, own) == (({}, "{q}?", ""), ({}, "{q}?", ""))
    assert resolved({"name": "e.jsonl", "system": "Other."})[0] == (*ALL[:2], "Other.")
    assert resolved({"task": "e.jsonl", "inherit": False})[0] == ({}, None, None)


def test_tasks_with_prompts_of_their_own() -> None:
    for name in ("arithmetic", "gsm8k", "reasoning-gym/leg_counting"):
        assert resolved(name, name) == (({}, None, "Think."), ({}, None, None))
        same = {**TASK, "name": name}
        assert resolved(name, name, task=same) == (ALL, ALL)
    as_text = {"name": "gsm8k", "options": {"format": "text"}}
    assert resolved(as_text)[0] == ({}, None, None)
    assert {*TASKS, *BENCHMARKS} == OWN_PROMPTS


def test_a_mixture_gives_what_its_tables_agree_on_or_the_table_of_the_same_name() -> None:
    other = {**TASK, "name": "other.jsonl", "template": "{prompt}?"}
    tables = {"mixture": [TASK, other]}

    def both(name: str) -> tuple[Any, ...]:
        data = {"model": {"name": "m"}, "evaluation": {"task": name}, **tables}
        recipe = load_recipe(data)
        assert recipe.evaluation is not None
        return fields(recipe.evaluation.task)

    assert both("e.jsonl") == (TASK["columns"], None, "Think.")
    assert both("other.jsonl") == (TASK["columns"], "{prompt}?", "Think.")


def test_recipes_of_older_run_folders_keep_their_prompts_and_held_out_rows() -> None:
    old = {
        "model": {"name": "m"}, "task": {**TASK, "held_out": 0.1}, "evaluation": {"task": {"name": "e.jsonl"}},
        "benchmarks": [{"task": {"name": "b.jsonl"}}, {"task": {"name": "gsm8k"}}],
    }  # fmt: skip
    recipe = load_recipe(translate_recipe(old))
    assert recipe.evaluation is not None
    assert fields(recipe.evaluation.task) == fields(recipe.benchmarks[0].task) == ({}, None, None)
    assert recipe.task.held_out_by == "prompt"
    plain = {"model": {"name": "m"}, "task": {"name": "a", "held_out": 0.1}, "evaluation": {"task": {"name": "b"}}}
    assert translate_recipe(plain) == plain, "nothing that would make a difference"
