"""Fuzz damaged run folders: of a training run, of labels, and a reward model trained on damaged labels.

Bytes are flipped; files are truncated, removed, swapped and rewritten, also with matching hashes. Every reader must
work or report the damage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from gruppo.config.loading import load_recipe, without_unused_fields
from gruppo.evaluation.runner import evaluate
from gruppo.rollout.labels import read_labels
from gruppo.runs.report import describe_run
from gruppo.runs.results import load_result
from gruppo.training.api import train
from gruppo.training.export import export
from gruppo.training.reward_model_api import label, train_reward_model
from gruppo.utils.files import file_sha256
from tests.fuzzing import JSON_VALUES, clear, command, examples, said_clearly

ROWS = [{"prompt": f"{first}{second}", "completion": first, "answer": first} for first in "abc" for second in "12"]


def rows_file(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def recipe_of(model: str, rows: str, **tables: Any) -> dict[str, Any]:
    recipe = {
        "run": {"name": "tiny", "steps": 4, "checkpoint_every": 2},
        "model": {"name": model, "device": "cpu", "dtype": "float32"},
        "task": {"name": rows},
        "sampling": {"prompts_per_step": 2, "group_size": 2, "max_tokens": 4},
        **tables,
    }
    return without_unused_fields(recipe)


@pytest.fixture(scope="module")
def run(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A finished SFT run, which samples nothing for training and is therefore quick to resume."""
    folder = tmp_path_factory.mktemp("fuzzed")
    rows = rows_file(folder)
    evaluation = {"task": rows, "questions": 2, "every": 2, "grader": "exact_match"}
    recipe = recipe_of(tiny_folder, rows, method={"name": "sft"}, evaluation=evaluation)
    train(recipe, out=folder / "run")
    return recipe, folder / "run"


@pytest.fixture(scope="module")
def labels(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    recipe = recipe_of(
        tiny_folder, rows_file(folder), method={"name": "grpo-process"},
        reward={"functions": ["tests/rewards/functions.py:begins_with_a_letter"], "workers": 1},
        reward_model={"kind": "process", "prompts": 4, "continuations": 1, "batch_size": 4},
    )  # fmt: skip
    label(recipe, out=folder / "labels")
    return recipe, folder / "labels"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


# (kind of damage, index of the file, position in it, new content)
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "swap", "bytes", "json", "json", "json", "line", "folder", "add"]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.binary(min_size=1, max_size=6) | JSON_VALUES,
    ),
    min_size=1,
    max_size=3,
)


def damaged(whole: Path, scratch: Path, damage: list[tuple[str, int, int, Any]], rehash: bool) -> Path:
    """Return a damaged copy of the folder; `rehash`: rewrite manifests to match the damage, as an attacker could."""
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for kind, which, where, what in damage:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
        texts = [path for path in files if path.suffix in {".json", ".jsonl", ".toml"}]
        path = (texts or files)[which % len(texts or files)] if kind in {"json", "line"} else files[which % len(files)]
        inflict(kind, path, files, where, what)
    manifests = [path for path in folder.rglob("manifest.json") if path.is_file()]
    for manifest in manifests if rehash else ():
        hashes = {
            path.name: file_sha256(path) for path in manifest.parent.iterdir() if path.is_file() and path != manifest
        }
        manifest.write_text(json.dumps(hashes))
    return folder


def inflict(kind: str, path: Path, files: list[Path], where: int, what: Any) -> None:
    content = path.read_bytes()
    noise = what if isinstance(what, bytes) else json.dumps(what).encode()
    place = where % (len(content) + 1)
    if kind == "flip" and content:
        at = where % len(content)
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 + where % 255)]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "drop":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(files[where % len(files)].read_bytes())
    elif kind == "bytes":
        path.write_bytes(noise)
    elif kind == "line":
        path.write_bytes(content + noise + b"\n")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "add":
        added = path.parent / ["step-x.parquet", "step-000009", "step-000001.parquet", "x.writing"][where % 4]
        if not added.is_dir():
            added.write_bytes(noise)
    elif kind == "json" and path.suffix in {".json", ".jsonl"}:
        lines = (
            content.decode(errors="replace").splitlines()
            if path.suffix == ".jsonl"
            else [content.decode(errors="replace")]
        )
        at = where % len(lines) if lines else 0
        try:
            lines[at] = json.dumps(changed(json.loads(lines[at]), where, json.loads(noise)))
        except (ValueError, IndexError):
            return
        path.write_text("\n".join(lines) + "\n")


def changed(value: Any, where: int, new: Any) -> Any:
    """The value with one item replaced or removed."""
    if isinstance(value, dict) and value:
        key = sorted(value)[where % len(value)]
        if where % 5 == 0:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: changed(value[key], where // 7, new)}
    if isinstance(value, list) and value:
        at = where % len(value)
        return [*value[:at], changed(value[at], where // 7, new), *value[at + 1 :]]
    return new


def read_everything(folder: Path) -> None:
    """Call every reader that `load_result` offers."""
    result = load_result(folder)
    uses: list[Callable[[], Any]] = [
        result.frame, result.rollouts, result.evaluations, result.events, result.load_model,
        lambda: result.rollouts(2), lambda: result.evaluations(0),
        lambda: describe_run(result.path, result.summary, result.metrics),
    ]  # fmt: skip
    for use in uses:
        with clear():
            use()


@examples(40, damage=DAMAGE, rehash=st.booleans())
def test_reading_results_of_damaged_runs(run: tuple, scratch: Path, damage: list, rehash: bool) -> None:
    with clear():
        read_everything(damaged(run[1], scratch, damage, rehash))


@examples(15, damage=DAMAGE, rehash=st.booleans(), checkpoint=st.sampled_from(["last", "best", "2", "x"]))
def test_exporting_damaged_runs(run: tuple, scratch: Path, damage: list, rehash: bool, checkpoint: str) -> None:
    folder = damaged(run[1], scratch, damage, rehash)
    shutil.rmtree(scratch / "exported", ignore_errors=True)
    with clear():
        export(folder, scratch / "exported", checkpoint=checkpoint)


@examples(20, damage=DAMAGE, rehash=st.booleans(), finished=st.booleans())
def test_resuming_damaged_runs(run: tuple, scratch: Path, damage: list, rehash: bool, finished: bool) -> None:
    recipe, whole = run
    folder = damaged(whole, scratch, damage, rehash)
    if not finished:
        shutil.rmtree(folder / "checkpoints" / "step-000004", ignore_errors=True)
    with clear():
        train(recipe, out=folder, resume=True)


@examples(15, damage=DAMAGE)
def test_evaluating_damaged_models(run: tuple, scratch: Path, damage: list) -> None:
    recipe, whole = run
    folder = damaged(whole / "model", scratch, damage, rehash=False)
    with clear():
        evaluate(str(folder), recipe["task"]["name"], grader="exact_match", questions=1, max_tokens=2, device="cpu",
                 dtype="float32")  # fmt: skip


@examples(30, damage=DAMAGE)
def test_reading_damaged_labels(labels: tuple, scratch: Path, damage: list) -> None:
    folder = damaged(labels[1], scratch, damage, rehash=False)
    with clear():
        read_labels(sorted((folder / "labels").glob("step-*.parquet")))


@examples(4, damage=DAMAGE)
def test_resuming_labelling_in_a_damaged_folder(labels: tuple, scratch: Path, damage: list) -> None:
    recipe, whole = labels
    with clear():
        label(recipe, out=damaged(whole, scratch, damage, rehash=False), resume=True)


@examples(6, damage=DAMAGE)
def test_training_on_damaged_labels(labels: tuple, scratch: Path, damage: list) -> None:
    recipe, whole = labels
    folder = damaged(whole, scratch, damage, rehash=False)
    shutil.rmtree(scratch / "reward_model", ignore_errors=True)
    with clear():
        train_reward_model(load_recipe(recipe), folder, out=scratch / "reward_model")


@examples(6, damage=DAMAGE, rehash=st.booleans())
def test_damaged_runs_on_the_command_line(run: tuple, scratch: Path, damage: list, rehash: bool) -> None:
    folder = damaged(run[1], scratch, damage, rehash)
    shutil.rmtree(scratch / "exported", ignore_errors=True)
    code, _, err = command("export", str(folder), "--to", str(scratch / "exported"))
    said_clearly(code, err)
    code, _, err = command("train", str(folder / "recipe.toml"), "--out", str(folder), "--resume")
    said_clearly(code, err)
