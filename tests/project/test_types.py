"""A user's script that configures a run in Python holds under mypy and pyright, with the types of gruppo's py.typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gruppo
from gruppo import Critic, Decoding, Evaluation, Lora, Method, Model, Optimizer, Recipe, Reward, Run, Sampling, Task


def short(completions: Sequence[str], **columns: Any) -> list[float]:
    return [-len(text) / 100 for text in completions]


class Watch(gruppo.Callback):
    def on_step(self, step: int, metrics: dict[str, Any], groups: Sequence[Any]) -> gruppo.StopTraining | None:
        return gruppo.STOP if metrics["reward/mean"] > 0.9 else None


class Guess:
    def reset(self, **columns: Any) -> None:
        self.tries = 0


recipe = Recipe(
    model=Model(name="smollm2-135m-instruct", lora=Lora(rank=8)),
    run=Run(name="short", steps=20, memory="4 GB"),
    task=Task(name="rows.jsonl", columns={"prompt": "question"}),
    reward=Reward(functions=["exact_match"], weights=[0.5]),
    environment=gruppo.EnvironmentTable(name="my_file.py:Guess", turns=2),
    method=Method(name="ppo", clip_high=0.3),
    critic=Critic(learning_rate=2e-5),
    sampling=Sampling(prompts_per_step=8, group_size=4),
    optimizer=Optimizer(schedule="cosine", warmup_ratio=0.1),
    evaluation=Evaluation(task=Task(name="gsm8k"), every=10, decoding=Decoding(temperature=0.6)),
)
steps: int = recipe.run.steps
loaded: Recipe = gruppo.load_recipe({"model": {"name": "m"}}, ["run.steps=5"])
result: gruppo.Result = gruppo.train(recipe, reward=short, callbacks=[Watch()], prompts=[{"prompt": "Hi"}])
reveal_type(recipe.optimizer.schedule)
"""
# Libraries whose types a user's script does not need; skipping them saves most of the time.
CONFIG = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,peft.*,numpy.*,datasets.*,pyarrow.*,pandas.*,typer.*,rich.*,tokenizers.*,safetensors.*]
follow_imports = skip
"""


MISTAKES = (
    "from gruppo import Method, Recipe, Run, Sampling, train\n"
    "recipe = Recipe(run=Run(stepz=3))\n"
    "Sampling(group_size='8')\n"
    "Method(scale='grup')\n"
    "train(recipe, out=3)\n"
    "train(recipe).no_such_thing\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("types")


def checked(folder: Path, script: str) -> list[str]:
    """What mypy says about a script, line by line."""
    (folder / "script.py").write_text(script)
    (folder / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "--no-error-summary"]
    environment = {**os.environ, "MYPYPATH": str(Path.cwd())}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([*command, "script.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_script_holds_under_mypy_strict(folder: Path) -> None:
    (line,) = checked(folder, SCRIPT)
    assert "Literal['constant'] | Literal['linear'] | Literal['cosine']" in line


def test_mistakes_in_a_script_are_found(folder: Path) -> None:
    lines = checked(folder, MISTAKES)
    found = {line.partition(": ")[0]: line for line in lines if " error: " in line}
    assert {place.split(":")[1] for place in found} == {"2", "3", "4", "5", "6"}
    assert any('Unexpected keyword argument "stepz"' in line for line in lines)
    assert any('Missing named argument "model"' in line for line in lines)


def test_the_scripts_under_pyright_strict(folder: Path) -> None:
    """basedpyright is pyright with its Node.js, and has the same rules in this mode."""
    pytest.importorskip("basedpyright", reason="the environment is older than basedpyright in requirements-dev.lock")
    for name, script in (("script.py", SCRIPT), ("mistakes.py", MISTAKES)):
        (folder / name).write_text(script)
    settings = {"typeCheckingMode": "strict", "include": ["*.py"], "extraPaths": [str(Path.cwd())]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--project", ".", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    told = {(Path(one["file"]).name, one["range"]["start"]["line"] + 1): one for one in found}
    (line,) = [one for (name, _), one in told.items() if name == "script.py"]
    assert line["severity"] == "information"
    assert "Literal['constant', 'linear', 'cosine']" in line["message"]
    errors = {place for (name, place), one in told.items() if name == "mistakes.py" and one["severity"] == "error"}
    assert errors == {2, 3, 4, 5, 6}
