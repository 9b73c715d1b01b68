"""What the README and the documentation show is what gruppo accepts: Python runs, recipes load, commands parse."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.main import get_command

from gruppo.cli.main import app
from gruppo.config.labels import options_name
from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.rewards import RewardRun, reward_path
from gruppo.rewards.loading import load_reward
from gruppo.study.arms import load_study
from tests.docs.blocks import PAGES, Block, blocks, commands
from tests.examples.tiny import save_tiny

SHORTENED = {
    '"steps": 20': '"steps": 3, "checkpoint_every": 3',
    '"max_tokens": 32': '"max_tokens": 8, "prompts_per_step": 2, "group_size": 2',
    "runs/NAME": "runs/watched",
    "range(20, 41)": "range(2, 4)",
    "import Rescores\n": 'import Rescores\nfound.write("rescored.parquet")\n',  # as --out does
    "max_completion_length=256": "max_completion_length=8, max_steps=1",
    "import load_dataset": "import Dataset",
    'load_dataset("trl-lib/DeepMath-103K", split="train")': "Dataset.from_list(two_rows)",
}
MODELS = ("smollm2-135m-instruct", "Qwen/Qwen2.5-0.5B-Instruct")
TWO_ROWS = [{"prompt": [{"role": "user", "content": f"1 + {n} ="}], "solution": f"${n + 1}$"} for n in (1, 2)]
COMMANDS = [pytest.param(text, complete, id=f"{page}-{text[:40]}") for page, text, complete in commands()]
ROOT = get_command(app)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def test_python_runs(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All blocks in one folder, from the first page to the last: later ones use the names and runs of earlier ones. A
    traceback names the page and the line of the block."""
    found = blocks("python")
    assert len(found) > 7
    names: dict[str, Any] = {"__name__": "block", "two_rows": TWO_ROWS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gruppo.training.hub_push.push_to_hub", no_upload)
    for block in found:
        text = block.text
        for long, short in {**SHORTENED, **dict.fromkeys(MODELS, tiny)}.items():
            text = text.replace(long, short)
        run_and_compare(text, str(block), names)


def run_and_compare(text: str, place: str, names: dict[str, Any]) -> None:
    """Run the code. An expression whose comment is a Python literal must have that value."""
    lines = text.splitlines()
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), place, "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), place, "eval"), names)
        shown = literal(lines[statement.end_lineno - 1][statement.end_col_offset :].strip().removeprefix("#"))
        assert shown is None or value == shown[0], place


def no_upload(run: Path, repository: str, *, private: bool) -> SimpleNamespace:
    """In place of `gruppo.training.hub_push.push_to_hub`, which tests/training/test_hub_push.py tests."""
    assert (run / "model").is_dir()
    return SimpleNamespace(url=repository)


def literal(text: str) -> tuple[Any] | None:
    """The value that a comment shows, in a tuple; None for words."""
    try:
        return (ast.literal_eval(text.strip()),)
    except (SyntaxError, ValueError):
        return None


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_recipes_load(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "study" in tomllib.loads(block.text):
        (tmp_path / "study.toml").write_text(block.text)
        assert load_study(tmp_path / "study.toml").runs
    else:
        load_with_rewards(block.text, monkeypatch)


@pytest.mark.parametrize("option", ["buffer = 64", "buffer_tokens = -1"])
def test_recipes_with_wrong_options_of_rewards_do_not_load(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = f'[reward]\nfunctions = ["short = overlong"]\n[reward.options.short]\n{option}'
    with pytest.raises(UsageError, match=r"reward\.options\.short\.buffer"):
        load_with_rewards(recipe, monkeypatch)


def load_with_rewards(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a recipe, or a part of one without a model, and each of its rewards that is not in a reader's file."""
    tables = tomllib.loads(text)
    tables.setdefault("model", {}).setdefault("name", "smollm2-135m-instruct")
    recipe = load_recipe(tables)
    for name in recipe.reward.environment:
        monkeypatch.setenv(name, "secret")
    for entry in recipe.reward.functions:
        name, path = options_name(entry), reward_path(entry)
        if ".py:" not in path:
            options = recipe.reward.options.get(name, {})
            load_reward(
                path, name, options, ["answer", "solution", "metadata"], run=RewardRun(name, recipe.reward.timeout)
            )


@pytest.mark.parametrize(("command", "complete"), COMMANDS)
def test_commands_parse(command: str, complete: bool) -> None:
    """As the command line parses them. `[…]` and `…` are notation, N is a number, and `>` is the shell's."""
    words = shlex.split(re.sub(r"(?<=\s)\[|\](?=\s|$)|…", "", command), comments=True)
    words = ["3" if word == "N" else word for word in words]
    words = words[1 : words.index(">") if ">" in words else None]
    try:
        context = ROOT.make_context("gruppo", list(words))
        name, subcommand, rest = ROOT.resolve_command(context, words)
        subcommand.make_context(name, rest, parent=context)
    except typer.Exit:
        pass  # --help
    except typer.BadParameter as error:  # a missing one is a kind of it
        if complete or type(error).__name__ != "MissingParameter":
            raise


def test_make_targets_and_scripts_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    targets = {name for line in re.findall(r"(?:^|`)make ([a-z -]+)", text, re.MULTILINE) for name in line.split()}
    scripts = set(re.findall(r"python ([\w/]+\.py)", text))
    assert len(targets) > 8
    assert len(scripts) > 3
    assert targets <= set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE))
    assert {name for name in scripts if not Path(name).is_file()} == set()


def test_notebook_runs_and_has_no_outputs(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(Path("examples/first_run.ipynb").read_text())["cells"] if "outputs" in cell]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        text = "".join(cell["source"]).replace("smollm2-135m-instruct", tiny).replace("tokens=24", "tokens=8")
        exec(compile(text, f"cell {number}", "exec"), names)
    assert names["right_and_short"]([[{"content": "7"}]], ["7"]) == [0.99]
    assert (tmp_path / "runs/notebook/model/README.md").is_file()


def test_every_warning_has_its_place_in_the_page_of_symptoms() -> None:
    warnings = re.findall(r"^## ([a-z-]+)$", Path("docs/warnings.md").read_text(), re.MULTILINE)
    page = Path("docs/it_does_not_learn.md").read_text()
    assert len(warnings) > 10
    assert {name for name in warnings if f"(warnings.md#{name})" not in page} == set()
