"""The studies of the repository (studies/): their files, their task and their rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gruppo.study.arms import load_study
from gruppo.utils.imports import import_attribute

STUDIES = Path(__file__).parents[2] / "studies"
FILES = sorted(STUDIES.glob("*.toml"))


@pytest.fixture
def chains() -> Callable[..., list[dict[str, Any]]]:
    load: Callable[..., list[dict[str, Any]]] = import_attribute(f"{STUDIES}/chains.py:load", "task.name")
    return load


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_is_valid_and_leads_to_its_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STUDIES.parent)
    study = load_study(path)
    assert study.file.study.conclusions, "a study says what a reader may conclude"
    assert study.page.resolve().parent == STUDIES.parent / "docs"
    assert study.folder.resolve().is_relative_to(STUDIES.parent / "runs"), "run folders are ignored by git"
    assert study.records.resolve().is_relative_to(STUDIES / "records")
    assert not any(".." in path.parts for path in (study.page, study.folder, study.records)), "they are in messages"
    assert study.file.evaluations
    assert study.file.figures


def test_a_solution_adds_one_number_per_line(chains: Callable[..., list[dict[str, Any]]]) -> None:
    for row in chains("train", terms=5, maximum=12)[:300]:
        expression = re.fullmatch(r"What is (.*)\? Add or subtract one number per line\.", row["prompt"])
        assert expression is not None
        lines = row["solution"].splitlines()
        assert len(lines) == 4
        total = int(expression[1].split()[0])
        for line, sign, number in zip(lines, expression[1].split()[1::2], expression[1].split()[2::2], strict=True):
            following = total + int(number) if sign == "+" else total - int(number)
            assert line == f"{total} {sign} {number} = {following}"
            assert 1 <= int(number) <= 12
            assert following >= 0
            total = following
        assert row["answer"] == total


def test_no_question_of_a_chain_is_in_two_splits(chains: Callable[..., list[dict[str, Any]]]) -> None:
    prompts = {
        name: [row["prompt"] for row in rows]
        for name, rows in {
            "test": chains("test"),
            "train": chains("train"),
            "search": chains("test", search=True),
            "rest": chains("train", search=True),
        }.items()
    }
    assert all(len(set(one)) == len(one) for one in prompts.values())
    assert not set(prompts["test"]) & set(prompts["train"])
    assert not set(prompts["search"]) & set(prompts["rest"])
    assert set(prompts["search"]) | set(prompts["rest"]) == set(prompts["train"])


def test_a_noisy_rule_flips_its_share_of_verdicts_and_the_same_ones_again() -> None:
    noisy = import_attribute(f"{STUDIES}/rules.py:noisy_last_number", "reward.functions")
    completions = [f"It is {number}." for number in range(2000)]
    arguments = {"prompts": ["How many?"] * 2000, "completions": completions, "answer": list(range(1000)) + [0] * 1000}
    assert noisy(**arguments, share=0.0) == [1.0] * 1000 + [0.0] * 1000
    verdicts = noisy(**arguments, share=0.2)
    assert verdicts == noisy(**arguments, share=0.2)
    # 200 of 1,000 are expected, with a standard deviation of 12.6: five of them to each side.
    assert 137 <= verdicts[:1000].count(0.0) <= 263
    assert 137 <= verdicts[1000:].count(1.0) <= 263
    assert noisy(**arguments, share=0.2, seed=1) != verdicts
    assert noisy(**arguments | {"answer": [None] * 2000}, share=0.2) == [None] * 2000


def test_a_random_reward_knows_nothing_of_the_answer() -> None:
    chance = import_attribute(f"{STUDIES}/rules.py:chance", "reward.functions")
    completions = [f"It is {number}." for number in range(2000)]
    verdicts = chance(prompts=["How many?"] * 2000, completions=completions, answer=completions)
    assert verdicts == chance(prompts=["How many?"] * 2000, completions=completions, answer=["0"] * 2000)
    assert 888 <= sum(verdicts) <= 1112  # five standard deviations of 22.4
