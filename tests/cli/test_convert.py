"""`gruppo convert` on the command line."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from gruppo.config.loading import load_recipe
from tests.fuzzing import command

YAML = """\
model_name_or_path: example/tiny
dataset_name: example/maths
reward_funcs: [accuracy_reward]
num_generations: 4
per_device_train_batch_size: 8
lora_dropout: 0.1
use_peft: true
"""


def gruppo(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    with contextlib.chdir(folder):
        return subprocess.CompletedProcess(arguments, *command("convert", *arguments))


def test_a_file_becomes_a_recipe_with_a_summary(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text(YAML)
    done = gruppo("grpo.yaml", "--processes", "2", "-o", "my.toml", "--beta", "0.02", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tmp_path / "my.toml")
    assert (recipe.sampling.prompts_per_step, recipe.method.kl_coef) == (4, 0.02)
    assert done.stdout == ""
    for line in ("grpo.yaml: TRL, grpo", "without equivalent         1", "lora_dropout = 0.1: ", "wrote my.toml"):
        assert line in done.stderr
    again = gruppo("grpo.yaml", "-o", "my.toml", folder=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


def test_a_command_line_goes_to_the_terminal(tmp_path: Path) -> None:
    words = [
        "python",
        "-m",
        "openrlhf.cli.train_ppo_ray",
        "--actor.model_name_or_path",
        "example/q",
        "--data.max_len",
        "99",
    ]
    done = gruppo(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "out.toml").write_text(done.stdout)
    assert load_recipe(tmp_path / "out.toml").model.name == "example/q"
    assert gruppo("--source", "openrlhf", "--", *words, folder=tmp_path).stdout == done.stdout


def test_what_cannot_be_read_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "lr.yaml").write_text("learning_rate: 1e-5\n")
    for arguments, words in (
        (["none.yaml"], "none.yaml"),
        (["lr.yaml"], "--source=trl-grpo"),
        (["lr.yaml", "--source", "keras"], "unknown"),
        (["python", "-m", "openrlhf.cli.train_sft", "--x", "1"], "train_ppo_ray only"),
    ):
        done = gruppo(*arguments, folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("gruppo: ")
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert gruppo("lr.yaml", "--source", "trl-sft", folder=tmp_path).returncode == 0
