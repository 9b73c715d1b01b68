"""A run folder of revision 790d39a, from before fields, values and metrics were renamed, can still be read.

`revision_790d39a/` holds its model, rows and run: GRPO with a trained reward model, two iterations, four steps.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gruppo
from gruppo.config.renames import EVENTS, FIELDS, METRICS, VALUES, translate_recipe
from gruppo.errors import UsageError
from gruppo.runs.reading import read_lines, read_metrics, read_table
from gruppo.runs.tables import EVALUATIONS

OLD = Path("tests/runs/revision_790d39a")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run"


def test_an_old_run_resumes_and_ends_with_the_same_weights(run: Path) -> None:
    wanted = load_file(run / "checkpoints/step-000004/weights.safetensors")
    judge = load_file(run / "checkpoints/step-000004/reward_model.weights.safetensors")
    before = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if "reward/mean" in line}
    shutil.rmtree(run / "checkpoints/step-000004")
    (run / "summary.json").unlink()
    result = gruppo.train(run / "recipe.toml", out=run, resume=True)
    assert result.summary["state"] == "done"
    for name, weights in (("weights", wanted), ("reward_model.weights", judge)):
        made = load_file(run / f"checkpoints/step-000004/{name}.safetensors")
        for key, tensor in weights.items():  # processors round differently
            torch.testing.assert_close(made[key], tensor, rtol=1e-5, atol=1e-7)
    after = {line["step"]: line for line in result.metrics if "reward/mean" in line}
    assert after.keys() == before.keys()
    assert before[3] == after[3], "a step that was kept is read as it was"
    assert not set(METRICS) & set(after[4])
    assert after[4]["reward/last_number/mean"] == before[4]["reward/last_number/mean"]


def test_old_lines_and_tables_are_read_with_the_current_names(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    names = {name for line in lines for name in line}
    assert {"groups/nonzero_advantage", "reward/excluded", "reward/last_number/mean", "eval/finished_share"} <= names
    assert not {"groups/with_signal", "reward/abstained", "reward/number/mean", "eval/ended_share"} & names
    assert not {event["kind"] for event in read_lines(run / "events.jsonl")} & set(EVENTS)
    table = read_table(run / "evaluations/step-000004.parquet", EVALUATIONS)
    assert "eval_set" in table.column_names
    assert "exam" not in table.column_names
    assert table["token_texts"].null_count == len(table), "not recorded"
    frame = gruppo.load_result(run).frame()
    assert frame["groups/nonzero_advantage"].notna().sum() == 4


def test_an_old_run_is_exported(run: Path, tmp_path: Path) -> None:
    made = gruppo.export(run, tmp_path / "out", checkpoint="4")
    assert made.step == 4
    assert "tis_cap = 2.0" in (tmp_path / "out" / "README.md").read_text()


def test_a_step_is_reproduced(run: Path) -> None:
    made = gruppo.reproduce(run, 4, tolerance=1e-4)
    assert made.equal, made.differences
    assert made.rewards == 12


def test_an_old_recipe_can_be_evaluated(run: Path) -> None:
    recipe = gruppo.load_recipe(run / "recipe.toml")
    assert recipe.evaluation is not None
    assert recipe.evaluation.grader == "numeric_answer"
    assert recipe.reward.functions == ["last_number"]


@pytest.mark.parametrize(("place", "new"), FIELDS.items(), ids=[".".join(place) for place in FIELDS])
def test_an_old_field_in_a_recipe_is_refused_with_the_new_one(place: tuple[str, str], new: str) -> None:
    table, field = place
    with pytest.raises(UsageError, match=rf"{table}\.{field} = .*renamed; write {table}\.{new}$"):
        gruppo.load_recipe({"model": {"name": "m"}, table: {field: 1}})


@pytest.mark.parametrize("old", VALUES["method", "source"])
def test_an_old_source_in_a_recipe_is_refused_with_the_new_one(old: str) -> None:
    with pytest.raises(UsageError, match=f'renamed; write "{VALUES["method", "source"][old]}"'):
        gruppo.load_recipe({"model": {"name": "m"}, "method": {"source": old}})


@pytest.mark.parametrize(("old", "new"), VALUES["reward", "functions"].items())
def test_an_old_reward_in_a_recipe_is_refused_with_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    recipe = {"model": {"name": str(OLD / "model")}, "task": {"name": str(OLD / "rows.jsonl")}}
    with pytest.raises(UsageError, match=rf'reward\.functions = "{old}": .*renamed; write "{new}"'):
        gruppo.train({**recipe, "reward": {"functions": [old]}}, out=tmp_path / "run")
    evaluation = {"task": str(OLD / "questions.jsonl"), "grader": "number"}
    with pytest.raises(UsageError, match=r'evaluation\.grader = "number": .*renamed; write "numeric_answer"'):
        gruppo.train({**recipe, "reward": {"functions": [new]}, "evaluation": evaluation}, out=tmp_path / "run")


def test_a_recipe_with_current_names_is_unchanged() -> None:
    recipe = gruppo.load_recipe(
        {"model": {"name": "m"}, "method": {"name": "rft"}, "reward": {"functions": ["choice"]}}
    )
    assert translate_recipe(recipe.as_mapping()) == recipe.as_mapping()
