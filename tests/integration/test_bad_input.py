"""Regression tests: one example of every kind of bad input for which tests/fuzz found a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.data.loading import checked_rows
from gruppo.data.transform import transform
from gruppo.errors import RunError, UsageError, one_line, speak_command_line
from gruppo.models.loading import find_model
from gruppo.rollout.labels import read_labels
from gruppo.runs.folder import RunFolder
from gruppo.runs.reading import reading
from gruppo.runs.results import load_result
from gruppo.training.api import train
from gruppo.training.checkpoint import load_state
from gruppo.training.export import export
from gruppo.utils.files import file_sha256
from gruppo.utils.paths import is_dir, is_file, user_path
from gruppo.utils.text import as_json
from tests.fuzz.test_folders import recipe_of, rows_file


def test_error_messages_are_one_encodable_line() -> None:
    assert one_line("wörd 🙂") == "wörd 🙂"
    assert one_line("a\nb\x1b[31m\ud800") == "a b\\x1b[31m\\ud800"
    assert str(UsageError("a\nb")) == "a b"
    assert str(RunError("a\r\ud800")) == "a \\ud800"
    assert str(RecipeError("one", "two\nlines")) == "one\ntwo lines"


@pytest.mark.parametrize(("on_the_command_line", "in_python"), [
    ("--resume runs/a: the recipe has changed", "out = runs/a: the recipe has changed"),
    ("--resume: the questions are not those", "resume=True: the questions are not those"),
    ("--out runs/a: exists; choose another --out", "out = runs/a: exists; choose another out="),
    ("fix it and continue with --resume", "fix it and continue with resume=True"),
    ("--dtype float16: cannot be exported", "dtype = float16: cannot be exported"),
    ("--max-shard-size huge: not a size", "max_shard_size = huge: not a size"),
    ("--checkpoint best: no step; use --checkpoint=last", 'checkpoint = best: no step; use checkpoint="last"'),
    ("--adapter: no adapter; leave it out", "adapter=True: no adapter; leave it out"),
    ("rounding can differ; --tolerance=1e-4 allows for it", "rounding can differ; tolerance=1e-4 allows for it"),
    ("--set steps=3: no table; write --set run.steps=3",
     'overrides = ["steps=3"]: no table; write overrides = ["run.steps=3"]'),
    ("write --set 'task.name=a b.jsonl', or remove it", 'write overrides = ["task.name=a b.jsonl"], or remove it'),
    ("in X: run `pip install --no-deps x`, or `gruppo export x --to y`",
     "in X: run `pip install --no-deps x`, or `gruppo export x --to y`"),
    ("trust_remote_code=True (on the command line --trust-remote-code)",
     "trust_remote_code=True"),
    ("the column a--b and x --- y", "the column a--b and x --- y"),
])  # fmt: skip
def test_errors_speak_the_language_of_the_caller(on_the_command_line: str, in_python: str) -> None:
    assert str(UsageError(on_the_command_line)) == in_python
    speak_command_line()
    assert str(UsageError(on_the_command_line)) == on_the_command_line


@pytest.mark.parametrize("data", [
    {"\ud800": None, "model": {"name": "m"}},
    {"model": {"name": "m"}, "reward": {"functions": ["f:g"], "options": {"f:g": {"\ud800": 1}}}},
    {"extends": "\ud800", "model": {"name": "m"}},
    {"extends": "a\x00", "model": {"name": "m"}},
    {"extends": "a" * 5000, "model": {"name": "m"}},
    {"extends": "~nobody-of-this-name/a.toml", "model": {"name": "m"}},
])  # fmt: skip
def test_invalid_recipes_are_refused(data: dict) -> None:
    with pytest.raises(RecipeError):
        load_recipe(data)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 5000, "a\x00b", "\ud800", "a" * 5000 + ".gguf"])
def test_names_that_are_invalid_as_paths_are_refused(name: str) -> None:
    assert not is_file(user_path(name))
    assert not is_dir(user_path(name))
    with pytest.raises(UsageError):
        find_model(name)
    from gruppo.config.sections import Task
    from gruppo.data.loading import load_questions
    from gruppo.utils.progress import NullProgress

    with pytest.raises(UsageError):
        load_questions(Task.model_construct(**{**Task().model_dump(), "name": name}), "task", NullProgress())


def test_a_message_without_a_role_is_refused() -> None:
    from gruppo.config.sections import Task

    rows = [{"prompt": [{"role": None, "content": "a"}]}]
    with pytest.raises(UsageError, match="without role and content"):
        checked_rows(rows, "rows")
    with pytest.raises(UsageError, match="without role and content"):
        transform(rows, Task(system="Think."), "task", "rows")


def test_columns_that_cannot_be_printed_or_serialized() -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("broken on purpose")

    assert as_json({"a": Unprintable()}) == '{"a": "<Unprintable that cannot be printed>"}'
    assert as_json({(1, 2): 3}) == '"{(1, 2): 3}"'
    assert json.loads(as_json([{Unprintable()}])) == [["<Unprintable that cannot be printed>"]]


@pytest.fixture(scope="module")
def whole(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("whole")
    recipe = recipe_of(
        tiny_folder, rows_file(folder), method={"name": "sft"},
        evaluation={"task": rows_file(folder), "questions": 2, "grader": "exact_match"},
    )  # fmt: skip
    train(recipe, out=folder / "run")
    return recipe, folder / "run"


@pytest.fixture
def run(whole: tuple, tmp_path: Path) -> Path:
    shutil.copytree(whole[1], tmp_path / "run")
    return tmp_path / "run"


def rewrite(file: Path, **values: Any) -> None:
    """Change fields of a JSON file and update its hash in the manifest, as an attacker could."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    manifest = file.parent / "manifest.json"
    if manifest.is_file():
        hashes = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**hashes, file.name: file_sha256(file)}))


@pytest.mark.parametrize(
    ("name", "content", "use"),
    [
        ("summary.json", "{", load_result),
        ("summary.json", "[]", load_result),
        ("metrics.jsonl", "{\n", load_result),
        ("metrics.jsonl", "3\n", load_result),
        ("metrics.jsonl", '{"a": 1}\n', lambda run: load_result(run).frame()),
        ("metrics.jsonl", '{"step": 1, "a": "b"}\n', lambda run: load_result(run).frame()),
        ("events.jsonl", "{\n", lambda run: load_result(run).events()),
        ("rollouts/step-000001.parquet", "x", lambda run: load_result(run).rollouts()),
        ("evaluations/step-000000.parquet", "x", lambda run: load_result(run).evaluations(0)),
        ("model/config.json", "{", lambda run: load_result(run).load_model()),
        ("model/model.safetensors", "x", lambda run: load_result(run).load_model()),
        ("environment.json", "[]", lambda run: export(run, run.parent / "out")),
        ("base/tokenizer.json", "{", lambda run: export(run, run.parent / "out")),
    ],
)
def test_a_damaged_file_of_a_run_is_reported(run: Path, name: str, content: str, use: Callable) -> None:
    (run / name).write_text(content)
    with pytest.raises(UsageError, match=r"is damaged|is not a number"):
        use(run)


@pytest.mark.parametrize(
    "values",
    [{"step": -1}, {"step": "4"}, {"lengths": {"metrics.jsonl": "x"}}, {"other": 1}, {"evaluations": {"0": {}}}],
)
def test_an_invalid_state_with_a_correct_hash_is_refused(run: Path, whole: tuple, values: dict) -> None:
    for folder in (run / "checkpoints").iterdir():
        rewrite(folder / "state.json", **values)
        with pytest.raises(UsageError, match="is damaged"):
            load_state(folder)
    with pytest.raises(UsageError, match="is damaged"):
        train(whole[0], out=run, resume=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_tensors_of_another_model_with_a_correct_hash_are_refused(run: Path, whole: tuple, name: str) -> None:
    for folder in (run / "checkpoints").iterdir():
        tensors = load_file(folder / name)
        save_file({key: torch.zeros(3, 3) for key in tensors}, folder / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, name: file_sha256(folder / name)}))
    with pytest.raises(UsageError, match="is damaged"):
        train(whole[0], out=run, resume=True)


@pytest.mark.parametrize(
    "chosen", [{}, {"threads": 0}, {"slots": "x"}, {"dtype": "int8"}, {"device": "x"}, {"recompute": 3}, None]
)
def test_resuming_with_an_unusable_environment_is_refused(run: Path, whole: tuple, chosen: dict | None) -> None:
    environment = json.loads((run / "environment.json").read_text())
    if chosen is None:
        del environment["data_sha256"]
    else:
        environment["chosen"] = {**environment["chosen"], **chosen} if chosen else {}
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(UsageError, match=r"environment.json: is damaged"):
        train(whole[0], out=run, resume=True)


def test_unrelated_files_in_a_run_folder_are_ignored(run: Path, whole: tuple) -> None:
    for folder in ("rollouts", "evaluations"):
        (run / folder / "step-x.parquet").write_text("x")
    (run / "rollouts" / "step-000009.parquet").mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    (run / "checkpoints" / "step-000009").write_text("x")
    assert train(whole[0], out=run, resume=True).summary["state"] == "done"
    assert export(run, run.parent / "out", checkpoint="4").step == 4


def test_damaged_recipe_and_folder_kind_are_refused(run: Path, whole: tuple) -> None:
    (run / "recipe.toml").write_text("[")
    with pytest.raises(UsageError, match=r"recipe.toml: is damaged"):
        train(whole[0], out=run, resume=True)
    (run / "folder.json").write_text("[]")
    with pytest.raises(UsageError, match=r"folder.json: is damaged"):
        train(whole[0], out=run, resume=True)


def test_labels_with_inconsistent_steps_are_refused(tmp_path: Path) -> None:
    from gruppo.runs.tables import LABELS

    row = {
        "prompt_id": "t/0", "prompt": '"q"', "columns": "{}", "prompt_token_ids": [1], "text": "ab",
        "token_ids": [1, 2], "finish_reason": "stop", "right": True,
        "step_texts": ["ab"], "step_ends": [1], "step_text_ends": [2],
        "soft": [0.5], "hard": [True], "continuation_tokens": 4,
    }  # fmt: skip
    run = RunFolder(tmp_path / "labels")
    (labels,) = read_labels([run.table("labels", 1, [row], LABELS)])
    assert labels.ends == (1,)
    for change in ({"step_ends": [5]}, {"soft": []}, {"token_ids": None}, {"prompt": "{"}, {"prompt": None}):
        with pytest.raises(UsageError, match="is damaged"):
            read_labels([run.table("labels", 1, [{**row, **change}], LABELS)])
    assert pq.read_schema(run.path / "labels" / "step-000001.parquet").names == LABELS.names


def test_a_full_disk_is_not_damage(tmp_path: Path) -> None:
    import errno

    with pytest.raises(OSError, match="full"), reading(tmp_path, "fix"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(RunError, match="unchanged"), reading(tmp_path, "fix"):
        raise RunError("unchanged")


@pytest.mark.parametrize(
    "name", ["rewards.log", "metrics.jsonl", "environment.json", "rollouts", "checkpoints", "base"]
)
def test_files_and_folders_in_place_of_each_other_are_refused(run: Path, whole: tuple, name: str) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
        (run / name).write_text("x")
    else:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    with pytest.raises(UsageError, match=f"{name} must be a (file|folder); restore it"):
        train(whole[0], out=run, resume=True)


def test_an_unwritable_log_leaves_no_pipe_open(tmp_path: Path) -> None:
    from gruppo.rollout.workers.rewards import RewardPool

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UsageError, match="cannot be written to"):
            RewardPool(["exact_match"], [], ["answer"], log=tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_with_too_many_files_is_refused_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gruppo.config.sections import Task
    from gruppo.data import hub
    from gruppo.data.loading import load_questions
    from gruppo.utils.progress import NullProgress

    (tmp_path / "inner").mkdir()
    for number in range(3):
        (tmp_path / "inner" / f"{number}.txt").write_text("a")
    monkeypatch.setattr(hub, "MOST_FILES", 2)
    with pytest.raises(UsageError, match="more than 2 files"):
        load_questions(Task(name=str(tmp_path)), "task", NullProgress())
