"""reasoning-gym: datasets by name, their parameters, their scorers as reward and as grader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gruppo.data.reasoning_gym import import_datasets, make_dataset, score
from gruppo.errors import UsageError
from gruppo.rewards.grading.graders import find_grader
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.training.api import train
from gruppo.types import Completion, Prompt
from tests.data.load import both_sides, questions, training
from tests.small_runs import recipe


def rows_of(name: str, **options: Any) -> list[dict[str, Any]]:
    return training(f"reasoning-gym/{name}", options={"size": 4, **options})


def test_rows_are_conversations_with_answers() -> None:
    rows = rows_of("leg_counting", min_animals=2, max_animals=2)
    assert len(rows) == 4
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": row["question"]}]
        assert len(row["metadata"]["animals"]) <= 2
        assert row["answer"] == str(row["metadata"]["total_legs"])
    assert rows != rows_of("leg_counting", min_animals=2, max_animals=2, seed=1)
    with_system = training(
        "reasoning-gym/leg_counting", options={"size": 1}, system="Count.", template="{question} Go."
    )
    assert [message["role"] for message in with_system[0]["prompt"]] == ["system", "user"]


def test_rows_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    """word_ladder and isomorphic_strings iterate over sets of words."""
    code = (
        "from gruppo.data.reasoning_gym import generate\n"
        "print([[row['question'], row['answer']] for name in ('word_ladder', 'isomorphic_strings')"
        " for row in generate(name, {'size': 6, 'seed': 3})])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


# Scorers that compare texts, compute from metadata, parse, read the parameters, or accept several answers.
SCORED = ("leg_counting", "word_ladder", "countdown", "maze", "sudoku", "basic_arithmetic", "needle_haystack", "codeio")


@pytest.mark.parametrize("name", SCORED)
def test_reference_answers_score_1_and_nonsense_does_not(name: str) -> None:
    is_correct = find_grader("reasoning_gym")
    for row in rows_of(name):
        assert score(row["answer"], row) == 1.0
        assert score(f"I think <answer>7</answer>, no: <answer> {row['answer']} </answer>.", row) == 1.0
        assert is_correct(f"<answer>{row['answer']}</answer>", row)
        assert not is_correct("no idea", row)


def test_a_composite_accepts_tables() -> None:
    parts = [{"name": "leg_counting", "weight": 1.0, "config": {}}, {"name": "maze", "weight": 2.0, "config": {}}]
    rows = rows_of("composite", size=6, datasets=parts)
    assert {row["metadata"]["source_dataset"] for row in rows} == {"leg_counting", "maze"}
    assert all(score(row["answer"], row) == 1.0 for row in rows)


def test_an_answer_that_the_scorer_cannot_parse_scores_0() -> None:
    row = rows_of("prime_factorization")[0]
    dataset = make_dataset("prime_factorization", row["parameters"])
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer("seven", row)
    assert score("seven", row) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("leg_countin", {}, ["task.name", 'did you mean "leg_counting"']),
        ("leg_counting", {"animals": 3}, ["task.options.animals = 3", "min_animals, max_animals", "seed, size"]),
        ("leg_counting", {"min_animals": "3"}, ["task.options.min_animals = '3'", "int"]),
        ("leg_counting", {"min_animals": 9, "max_animals": 2}, ["task.options", "max_animals must be >= min_animals"]),
        ("leg_counting", {"size": 0}, ["task.options.size = 0"]),
        ("letter_jumble", {"min_word_len": 40, "max_word_len": 40}, ["row 1 cannot be generated", "options"]),
        ("composite", {}, ["at least one dataset"]),
        ("composite", {"datasets": [{"nam": "maze"}]}, ["task.options.datasets", "name, weight, config"]),
    ],
)
def test_mistakes_are_reported(name: str, options: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        training(f"reasoning-gym/{name}", options=options)
    for word in words:
        assert word in str(caught.value)


def test_missing_package_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.composite", None)
    with pytest.raises(UsageError, match=r"pip install .gruppo\[tasks\]"):
        training("reasoning-gym/leg_counting")


def test_held_out_share() -> None:
    train_part, held_out = both_sides(
        "reasoning-gym/leg_counting", options={"size": 40, "max_animals": 3}, held_out=0.3
    )
    assert not {row["question"] for row in train_part.rows} & {row["question"] for row in held_out.rows}
    assert len(questions("reasoning-gym/leg_counting", options={"size": 3}).rows) == 3
    with pytest.raises(UsageError, match=r"task\.held_out = 0\.1"):
        both_sides("reasoning-gym/leg_counting", options={"size": 3})
    with pytest.raises(UsageError, match=r'task\.split = "test"'):
        training("reasoning-gym/leg_counting", split="test")


def test_reward_runs_in_its_process_without_torch() -> None:
    rows = [*rows_of("leg_counting")[:1], *rows_of("countdown")[:1], {"answer": "4"}]
    groups = []
    for row in rows:
        texts = [f"<answer>{row['answer']}</answer>", "no idea"]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompt = Prompt("t/0", [{"role": "user", "content": "?"}], (1,), "t", columns)
        groups.append((prompt, [Completion((1,), (0.0,), (True,), "stop", 0, text) for text in texts]))
    with RewardPool(["reasoning_gym"], [], ["answer"], timeout=60.0, workers=1) as pool:
        scored, _ = pool.score(groups, {})
    assert [[reward.total for reward in rewards] for rewards in scored] == [[1.0, 0.0], [1.0, 0.01], [None, None]]
    code = "import gruppo.rewards.reasoning_gym, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_on_reasoning_gym(tiny_folder: str, tmp_path: Path) -> None:
    data = recipe(
        tiny_folder, run__steps=2, reward__functions=["reasoning_gym"], evaluation__grader="reasoning_gym",
        reward__timeout=60.0,
    )  # fmt: skip
    data["task"] = {
        "name": "reasoning-gym/chain_sum",
        "options": {"size": 30, "max_terms": 2, "max_digits": 1},
        "template": "{answer}",
        "held_out": 0.3,
    }
    result = train(data, out=tmp_path / "run")
    assert result.summary["state"] == "done"
    assert result.summary["questions"] > 3
    assert result.metrics[1]["reward/excluded"] == 0
    assert "reward/reasoning_gym/mean" in result.metrics[1]


def test_the_reward_needs_reasoning_gym_rows(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scores only rows of reasoning-gym"):
        train(recipe(tiny_folder, reward__functions=["reasoning_gym"]), out=tmp_path / "run")


def test_every_dataset_has_parameters_that_a_recipe_can_contain() -> None:
    assert len(import_datasets()) > 100
    for name in sorted(set(import_datasets()) - {"composite"}):
        make_dataset(name, {"size": 1, "seed": 0})
