"""A study of the tiny model: two arms, two seeds, a few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gruppo.study.arms import load_study
from gruppo.study.runner import Outcome, StudyRunner
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import stop_on_signals
from tests.prestarted import prestarted_workers
from tests.small_runs import ROWS

STUDY = """
[study]
name = "tiny"
title = "Two learning rates"
text = "What the page begins with."
runs = "runs"
seeds = [1, 2]
budget = {{ tokens = {tokens} }}
conclusions = "Nothing."

[recipe]
run = {{ steps = 9, checkpoint_every = 1 }}
model = {{ name = "{model}", device = "cpu", dtype = "float32" }}
task = {{ name = "{train}" }}
reward = {{ functions = ["tests/rewards/functions.py:likes_letters"], workers = 1 }}
method.kl_coef = 0.0
sampling = {{ prompts_per_step = 2, group_size = 4, max_tokens = 8 }}
optimizer.learning_rate = 3e-3

[[arms]]
name = "low"
label = "low | rate"

[[arms]]
name = "high"
changes = {{ "optimizer.learning_rate" = 3e-2 }}
chosen_on = "two values on the training prompts"

[[evaluations]]
name = "letters"
task = "{test}"
grader = "exact_match"
questions = 4
samples = 2
max_tokens = 2
decoding = {{ temperature = 1.0 }}

[[questions]]
id = "learned"
text = "Is it better than before?"
metric = "letters/accuracy"
arms = ["initial", "low"]
alternative = "greater"

[[questions]]
id = "rates"
text = "Do the rates differ?"
metric = "letters/pass@2"
arms = ["low", "high"]

[[figures]]
name = "reward"
kind = "curve"
metric = "reward/mean"

[[figures]]
name = "bars"
kind = "bars"
metric = "letters/accuracy"

[[figures]]
name = "samples"
kind = "samples"
evaluation = "letters"
"""


def write_study(folder: Path, model: str, tokens: int = 150, text: str = STUDY) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = [{"prompt": letter, "answer": "a"} for letter in "abc"] + [{"prompt": "A1", "answer": "a"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "study.toml"
    file.write_text(text.format(model=model, train=folder / "train.jsonl", test=folder / "test.jsonl", tokens=tokens))
    return file


def run(file: Path, **options: Any) -> Outcome:
    with prestarted_workers(), stop_on_signals(kills=True) as stop:
        return StudyRunner(load_study(file), NullProgress(), stop, **options).run()


@pytest.fixture(scope="session")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study that has run. Tests change copies of it only."""
    file = write_study(tmp_path_factory.mktemp("study") / "a", tiny_folder)
    outcome = run(file)
    assert (outcome.failed, outcome.left) == ({}, [])
    return file


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "study")
    return tmp_path / "study" / "study.toml"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture
def study_file(tiny_folder: str, tmp_path: Path) -> Path:
    return write_study(tmp_path, tiny_folder)
