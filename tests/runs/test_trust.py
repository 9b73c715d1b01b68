"""Code that a run folder from somebody else names runs only after consent, and nothing of it is imported before."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from gruppo.cli.main import main
from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.rollout.reward_failures import rerun_reward
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.trust import code_of, foreign_code, is_own, remember
from gruppo.training.api import train
from gruppo.training.reproduce import reproduce
from gruppo.utils.imports import import_attribute
from tests.small_runs import ROWS, recipe, small_run

NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": {"name": "evil:load", "options": {"a": 1}}}, 'task.name = "evil:load"'),
    "mixture": ({"mixture": [{"name": "arithmetic"}, {"name": "evil.py:load"}]}, "mixture[1].name"),
    "reward": ({"reward": {"functions": ["last_number", "evil:f"]}}, 'reward.functions = "evil:f"'),
    "reward of verl": ({"reward": {"functions": ["verl:evil.py:f"]}}, 'reward.functions = "verl:evil.py:f"'),
    "a class of the standard library with options": (
        {"environment": {"name": "subprocess:Popen", "options": {"args": "rm -r /", "shell": True}}}, "rm -r /",
    ),
    "gruppo's own functions, which can write files": (
        {"task": {"name": "gruppo.training.export:export"}}, "gruppo.training.export:export",
    ),
    "split": (
        {"method": {"name": "grpo-process"}, "reward_model": {"kind": "process", "split": "evil:f"}},
        "reward_model.split",
    ),
    "audit": ({"audit": {"function": "evil:f"}}, "audit.function"),
    "surrogate": ({"method": {"surrogate": "evil:f"}}, "method.surrogate"),
    "grader": ({"evaluation": {"grader": "evil:f"}}, "evaluation.grader"),
    "evaluation task": ({"evaluation": {"task": "evil:f"}}, "evaluation.task.name"),
    "benchmark": ({"benchmarks": [{"task": "evil:f"}]}, "benchmarks[0].task.name"),
    "benchmark's grader": ({"benchmarks": [{"task": "gsm8k", "grader": "evil:f"}]}, "benchmarks[0].grader"),
    "environment": ({"environment": {"name": "evil.py:Env"}}, "environment.name"),
    "no sandbox": (
        {"environment": {"name": "python", "run_model_code_WITHOUT_A_SANDBOX": True}}, "code that the model writes",
    ),
    "the model's files": ({"model": {"name": "owner/model", "trust_remote_code": True}}, "Python files of owner/model"),
}  # fmt: skip
HARMLESS: dict[str, dict[str, Any]] = {
    "built-in names": {"reward": {"functions": ["last_number", "regex"], "options": {"regex": {"pattern": "a:b"}}}},
    "passed from Python": {"task": {"name": "in-memory:prompts"}, "reward": {"functions": ["in-memory:f"]}},
    "files": {"task": {"name": "c:/rows.jsonl"}},
    "reasoning-gym": {"task": {"name": "reasoning-gym/a:b"}},
    "a sandbox": {"environment": {"name": "python"}},
}


@pytest.mark.parametrize("name", NAMED)
def test_code_is_named_with_its_field(name: str) -> None:
    tables, words = NAMED[name]
    (code,) = code_of(load_recipe({"model": {"name": "x"}, **tables}))
    assert words in str(code)


@pytest.mark.parametrize("name", HARMLESS)
def test_built_in_names_and_data_are_not_code(name: str) -> None:
    assert code_of(load_recipe({"model": {"name": "x"}, **HARMLESS[name]})) == []


def test_code_is_shown_with_its_file_and_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported to find the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").mkdir()
    for file in ("evil/__init__.py", "mine.py"):
        (tmp_path / file).write_text("raise SystemExit('imported')")
    tables = {"functions": ["evil.part:f", "mine.py:f", "none.py:f"], "environment": ["OPENAI_API_KEY"]}
    shown = [str(code) for code in code_of(load_recipe({"model": {"name": "x"}, "reward": tables}))]
    assert f"in {tmp_path}/evil/__init__.py" in shown[0]
    assert f"in {tmp_path}/mine.py" in shown[1]
    assert "does not exist" in shown[2]
    assert all("OPENAI_API_KEY" in line for line in shown)
    assert "evil" not in sys.modules


def test_only_the_folder_that_this_user_wrote_is_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text('[model]\nname = "x"\n[reward]\nfunctions = ["a.py:f"]\n')
    used = load_recipe(folder / "recipe.toml")
    assert not is_own(folder)
    assert [code.name for code in foreign_code(folder, used)] == ["a.py:f"]
    remember(folder)
    assert is_own(folder)
    assert foreign_code(folder, used) == []
    (tmp_path / "link").symlink_to(folder)
    assert is_own(tmp_path / "link")
    shutil.copytree(folder, tmp_path / "copy")
    assert not is_own(tmp_path / "copy")
    (folder / "recipe.toml").write_text('[model]\nname = "x"\n[reward]\nfunctions = ["b.py:f"]\n')
    assert not is_own(folder)  # another recipe at the same path


def test_without_a_cache_everything_is_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.toml").touch()
    remember(tmp_path)
    assert not is_own(tmp_path)


CODE = (
    "import pathlib\n"
    "pathlib.Path(__file__ + '.ran').touch()\n"
    "def f(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    "def g(completions, **_):\n    raise OSError('no')\n"
    "def grade(answer, row):\n    return True\n"
    "def load(split):\n    return [{'prompt': p + q, 'answer': p} for p in 'abcdef' for q in '123']\n"
)


@pytest.fixture(scope="module")
def original(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose task, rewards, grader and audit are functions in a file next to it."""
    place = tmp_path_factory.mktemp("theirs")
    (place / "theirs.py").write_text(CODE)
    file = f"{place}/theirs.py"
    data = recipe(
        tiny_folder,
        run__steps=1,
        reward__functions=[f"{file}:f", f"{file}:g"],
        reward__failure_limit=1.0,
        task__name=f"{file}:load",
        evaluation__task=f"{file}:load",
        evaluation__questions=2,
        evaluation__max_tokens=2,
        evaluation__grader=f"{file}:grade",
    )
    (place / "recipe.toml").write_text(tomli_w.dumps(data))
    from gruppo.training.api import train

    return train(place / "recipe.toml", out=place / "run", progress=False).path


@pytest.fixture
def foreign(original: Path, tmp_path: Path) -> Path:
    """A copy of the folder, as somebody else receives it. Its code has not run there yet."""
    (original.parent / "theirs.py.ran").unlink(missing_ok=True)
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gruppo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


Call = Callable[..., tuple[int, str, str]]


def ran(original: Path) -> bool:
    return (original.parent / "theirs.py.ran").exists()


def failed_call(folder: Path) -> Path:
    return next((folder / "failures").iterdir())


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "reproduce": lambda run: ["reproduce", run, "--step", 1],
    "rerun-reward": lambda run: ["rerun-reward", failed_call(run)],
    "eval": lambda run: ["eval", run, "--device", "cpu"],
    "eval --recipe": lambda run: ["eval", run, "--recipe", run / "recipe.toml", "--device", "cpu"],
    "train --resume": lambda run: ["train", run / "recipe.toml", "--out", run, "--resume"],
    "check": lambda run: ["check", run / "recipe.toml", "--quick"],
    "label": lambda run: ["label", run / "recipe.toml", "--out", run.parent / "labels"],
    "reward-model": lambda run: ["reward-model", run / "recipe.toml", run, "--out", run.parent / "model"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_without_a_terminal_and_says_what_to_write(
    name: str, original: Path, foreign: Path, called: Call
) -> None:
    command = COMMANDS[name](foreign)
    code, _, error = called(*command)
    assert (code, error.count("\n")) == (2, 1)
    assert "theirs.py:" in error
    assert " ".join(["gruppo", *map(str, command), "--trust"]) in error
    assert not ran(original)


@pytest.mark.parametrize("name", ["reproduce", "rerun-reward", "eval", "train --resume"])
def test_every_command_runs_the_code_with_consent(name: str, original: Path, foreign: Path, called: Call) -> None:
    code, _, error = called(*COMMANDS[name](foreign), "--trust")
    assert code == (1 if name == "rerun-reward" else 0), error
    assert ran(original)


@pytest.mark.parametrize("name", ["reproduce", "rerun-reward", "eval"])
def test_a_folder_of_this_user_needs_no_consent(name: str, original: Path, called: Call) -> None:
    code, _, error = called(*COMMANDS[name](original))
    assert code == (1 if name == "rerun-reward" else 0), error


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_the_user_is_asked(
    answer: str, original: Path, foreign: Path, called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    code, _, _ = called(*COMMANDS["reproduce"](foreign))
    assert (code, ran(original)) == ((0, True) if answer == "y" else (2, False))
    page = shown.getvalue()
    assert f'reward.functions = "{original.parent}/theirs.py:f"' in page
    assert "[y/N]" in page
    assert ("nothing was run" in page) == (answer != "y")


def test_in_python_the_argument_trust_is_needed(original: Path, foreign: Path) -> None:
    with pytest.raises(UsageError, match=r"theirs\.py:load.*pass trust=True"):
        reproduce(foreign, 1)
    with pytest.raises(UsageError, match=r"theirs\.py:g.*pass trust=True"):
        rerun_reward(failed_call(foreign))
    assert not ran(original)
    assert reproduce(foreign, 1, trust=True).equal
    assert rerun_reward(failed_call(foreign), trust=True)[0].failure


def test_what_is_passed_from_python_replaces_the_folders_code(tiny_folder: str, tmp_path: Path) -> None:
    def likes(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    small_run(
        tiny_folder, tmp_path / "run", run__steps=1, reward__functions=["tests/rewards/functions.py:likes_letters"]
    )
    theirs = shutil.copytree(tmp_path / "run", tmp_path / "theirs")
    with pytest.raises(UsageError, match="likes_letters"):
        reproduce(theirs, 1, prompts=ROWS)
    assert reproduce(theirs, 1, prompts=ROWS, reward=likes).completions == 16


@pytest.mark.parametrize(
    ("table", "field", "labelled"),
    [
        ("reward", "functions", True), ("reward", "functions", False), ("method", "surrogate", False),
        ("evaluation", "grader", False), ("environment", "name", False), ("task", "name", False),
    ],
)  # fmt: skip
def test_a_name_of_an_object_in_memory_imports_nothing(
    table: str, field: str, labelled: bool, tiny_folder: str, tmp_path: Path
) -> None:
    """A path can begin with the prefix of such names, and still lead to a file."""
    code = tmp_path / "evil.py"
    code.write_text("import pathlib\npathlib.Path(__file__ + '.ran').touch()\ndef f(*_, **__): return [0.0]\n")
    name = f"in-memory:/../{'../' * 30}{code}:f".replace("//", "/")
    name = f"a = {name}" if labelled else name
    data = recipe(tiny_folder, run__steps=1)
    data.setdefault(table, {})[field] = [name] if field == "functions" else name
    if table == "evaluation":
        data["evaluation"] |= {"task": "arithmetic"}
    with pytest.raises(UsageError, match="in-memory:"):
        train(data, prompts=None if table == "task" else ROWS, out=tmp_path / "run", progress=False)
    assert not Path(f"{code}.ran").exists()


def test_options_in_place_of_the_folders_code_need_no_consent(foreign: Path, original: Path, called: Call) -> None:
    task = ["--task", "arithmetic", "--questions", "2", "--max-tokens", "2"]
    code, _, error = called(*COMMANDS["eval"](foreign), *task)
    assert (code, ran(original)) == (0, False), error
    code, page, error = called("rerun-reward", failed_call(foreign), "--function", "exact_match")
    assert (code, ran(original)) == (0, False), page + error
    assert called("train", foreign / "recipe.toml", "--show")[0] == 0
    assert not ran(original)


def test_a_saved_call_in_an_own_folder_that_names_another_function(original: Path, tmp_path: Path) -> None:
    call = json.loads(failed_call(original).read_text())
    planted = original / "failures" / "planted.json"
    for function, variables in (("os:system", []), ("subprocess:Popen", ["OPENAI_API_KEY"])):
        planted.write_text(json.dumps({**call, "function": function, "environment": variables}))
        with pytest.raises(UsageError, match=function):
            rerun_reward(planted)
    planted.unlink()


def test_files_that_are_no_saved_calls(tmp_path: Path, original: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**40)
    call = json.loads(failed_call(original).read_text())
    (tmp_path / "list").write_text(json.dumps({**call, "function": ["os:system"]}))
    (tmp_path / "names").write_text(json.dumps({**call, "environment": [1]}))
    for name in ("pipe", "huge", "list", "names", "."):
        with pytest.raises(UsageError, match=r"not a saved reward call|is larger than"):
            rerun_reward(tmp_path / name, "exact_match")


def test_a_recipe_outside_of_a_run_folder_is_the_users_choice(original: Path, called: Call) -> None:
    code, _, error = called("check", original.parent / "recipe.toml", "--quick", "--set", "sampling.max_tokens=0")
    assert code == 2
    assert "--trust" not in error


def test_an_older_folder_becomes_own_when_its_user_resumes_it(original: Path, foreign: Path, called: Call) -> None:
    code, _, error = called("train", original.parent / "recipe.toml", "--out", foreign, "--resume")
    assert code == 0, error
    assert is_own(foreign)


def test_files_in_the_current_folder_replace_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the processes of rewards, nor in those of reasoning-gym, nor in the trainer."""
    for name in ("json", "pickle", "runpy", "random", "numpy", "psutil", "reasoning_gym"):
        (tmp_path / f"{name}.py").write_text(f"open('{tmp_path}/ran', 'w').write(__name__)\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert import_attribute("gruppo.data.arithmetic:load", "task.name")
    with RewardPool(["last_number"], [], ["answer"], 10.0, 1, None):
        pass
    from gruppo.data.reasoning_gym import generate

    assert next(iter(generate("leg_counting", {"size": 1})))["answer"]
    assert sys.path == path
    assert not (tmp_path / "ran").exists()
