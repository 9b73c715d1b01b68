"""Bad input that once ended in a traceback: an example of each kind that property-based tests (tests/fuzz) found."""

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
from gruppo.errors import RunError, UsageError, one_line
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


def test_messages_are_one_line_that_any_file_can_hold() -> None:
    assert one_line("wörd 🙂") == "wörd 🙂"
    assert one_line("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"
    assert str(UsageError("a\nb")) == "a\\nb"
    assert str(RunError("a\r\ud800")) == "a\\r\\ud800"
    assert str(RecipeError("one", "two\nlines")) == "one\ntwo\\nlines"


@pytest.mark.parametrize("data", [
    {"\ud800": None, "model": {"name": "m"}},
    {"model": {"name": "m"}, "reward": {"functions": ["f:g"], "options": {"f:g": {"\ud800": 1}}}},
    {"extends": "\ud800", "model": {"name": "m"}},
    {"extends": "a\x00", "model": {"name": "m"}},
    {"extends": "a" * 5000, "model": {"name": "m"}},
    {"extends": "~nobody-of-this-name/a.toml", "model": {"name": "m"}},
])  # fmt: skip
def test_recipes(data: dict) -> None:
    with pytest.raises(RecipeError):
        load_recipe(data)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 5000, "a\x00b", "\ud800", "a" * 5000 + ".gguf"])
def test_names_that_no_file_can_have(name: str) -> None:
    assert not is_file(user_path(name))
    assert not is_dir(user_path(name))
    with pytest.raises(UsageError):
        find_model(name)
    from gruppo.config.sections import Task
    from gruppo.data.loading import load_questions
    from gruppo.utils.progress import NullProgress

    with pytest.raises(UsageError):
        load_questions(Task.model_construct(**{**Task().model_dump(), "name": name}), "task", NullProgress())


def test_a_message_without_a_role() -> None:
    from gruppo.config.sections import Task

    rows = [{"prompt": [{"role": None, "content": "a"}]}]
    with pytest.raises(UsageError, match="without role and content"):
        checked_rows(rows, "rows")
    with pytest.raises(UsageError, match="without role and content"):
        transform(rows, Task(system="Think."), "task", "rows")


def test_columns_that_cannot_be_printed_or_are_too_deep() -> None:
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
    """Change fields of a JSON file, and the manifest beside it, as a stranger could."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    manifest = file.parent / "manifest.json"
    if manifest.is_file():
        held = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**held, file.name: file_sha256(file)}))


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
def test_a_damaged_file_of_a_run_is_named(run: Path, name: str, content: str, use: Callable) -> None:
    (run / name).write_text(content)
    with pytest.raises(UsageError, match=r"is damaged|is not a number"):
        use(run)


@pytest.mark.parametrize(
    "values",
    [{"step": -1}, {"step": "4"}, {"lengths": {"metrics.jsonl": "x"}}, {"other": 1}, {"evaluations": {"0": {}}}],
)
def test_a_state_that_agrees_with_its_hash_and_is_none(run: Path, whole: tuple, values: dict) -> None:
    for folder in (run / "checkpoints").iterdir():
        rewrite(folder / "state.json", **values)
        with pytest.raises(UsageError, match="is damaged"):
            load_state(folder)
    with pytest.raises(UsageError, match="is damaged"):
        train(whole[0], out=run, resume=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_tensors_that_agree_with_their_hash_and_are_of_another_model(run: Path, whole: tuple, name: str) -> None:
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
def test_an_environment_that_a_resumed_run_cannot_use(run: Path, whole: tuple, chosen: dict | None) -> None:
    held = json.loads((run / "environment.json").read_text())
    if chosen is None:
        del held["data_sha256"]
    else:
        held["chosen"] = {**held["chosen"], **chosen} if chosen else {}
    (run / "environment.json").write_text(json.dumps(held))
    with pytest.raises(UsageError, match=r"environment.json: is damaged"):
        train(whole[0], out=run, resume=True)


def test_files_of_other_names_in_the_folders_of_a_run(run: Path, whole: tuple) -> None:
    for folder in ("rollouts", "evaluations"):
        (run / folder / "step-x.parquet").write_text("x")
    (run / "rollouts" / "step-000009.parquet").mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    (run / "checkpoints" / "step-000009").write_text("x")
    assert train(whole[0], out=run, resume=True).summary["state"] == "done"
    assert export(run, run.parent / "out", checkpoint="4").step == 4


def test_recipe_and_kind_of_a_folder(run: Path, whole: tuple) -> None:
    (run / "recipe.toml").write_text("[")
    with pytest.raises(UsageError, match=r"recipe.toml: is damaged"):
        train(whole[0], out=run, resume=True)
    (run / "folder.json").write_text("[]")
    with pytest.raises(UsageError, match=r"folder.json: is damaged"):
        train(whole[0], out=run, resume=True)


def test_labels_whose_steps_do_not_fit(tmp_path: Path) -> None:
    from gruppo.runs.tables import LABELS

    row = {
        "prompt_id": "t/0", "prompt": '"q"', "columns": "{}", "prompt_token_ids": [1], "text": "ab",
        "token_ids": [1, 2], "finish_reason": "stop", "right": True,
        "step_texts": ["ab"], "step_ends": [1], "step_text_ends": [2],
        "soft": [0.5], "hard": [True],
    }  # fmt: skip
    run = RunFolder(tmp_path / "labels")
    (made,) = read_labels([run.table("labels", 1, [row], LABELS)])
    assert made.ends == (1,)
    for change in ({"step_ends": [5]}, {"soft": []}, {"token_ids": None}, {"prompt": "{"}, {"prompt": None}):
        with pytest.raises(UsageError, match="is damaged"):
            read_labels([run.table("labels", 1, [{**row, **change}], LABELS)])
    assert pq.read_schema(run.path / "labels" / "step-000001.parquet").names == LABELS.names


def test_a_full_disk_is_not_damage(tmp_path: Path) -> None:
    import errno

    with pytest.raises(OSError, match="full"), reading(tmp_path, "fix"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(RunError, match="own"), reading(tmp_path, "fix"):
        raise RunError("own")


@pytest.mark.parametrize(
    "name", ["rewards.log", "metrics.jsonl", "environment.json", "rollouts", "checkpoints", "base"]
)
def test_files_that_are_folders_and_folders_that_are_files(run: Path, whole: tuple, name: str) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
        (run / name).write_text("x")
    else:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    with pytest.raises(UsageError, match=f"{name} is not what a run makes of it"):
        train(whole[0], out=run, resume=True)


def test_a_log_that_cannot_be_written_leaves_no_pipe_open(tmp_path: Path) -> None:
    from gruppo.rollout.workers.rewards import RewardPool

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UsageError, match="cannot be written to"):
            RewardPool(["exact_match"], [], ["answer"], log=tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_a_part_of_a_disk_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
