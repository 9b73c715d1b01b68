"""Several tasks in one run: shares by weight, sampling that continues where it stopped, runs that survive a kill."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gruppo.config.loading import load_recipe
from gruppo.data.mixture import Mixture, draw_prompts, interleaved
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import Data, preflight
from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from gruppo.types import Prompt
from gruppo.utils.progress import NullProgress
from tests.data.load import Notes
from tests.small_runs import ROWS, fingerprint, recipe

SIZES, WEIGHTS = (7, 30, 2), (1.0, 3.0, 0.5)


def mixture(seed: int = 0) -> Mixture:
    parts = [[Prompt(f"{t}/{n}", "", (1,), str(t), {}) for n in range(size)] for t, size in enumerate(SIZES)]
    return Mixture(parts, WEIGHTS, seed)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_tasks_are_sampled_by_their_weights() -> None:
    sampled = Counter(prompt.task for prompt in mixture().draw(0, 20_000))
    shares = np.array([sampled[str(task)] for task in range(3)]) / 20_000
    expected = np.array(WEIGHTS) / sum(WEIGHTS)
    assert np.all(np.abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000))


@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_sampling_does_not_depend_on_the_batch_size(batch: int) -> None:
    whole = ids(mixture(3).draw(0, 120))
    assert [prompt_id for cursor in range(0, 120, batch) for prompt_id in ids(mixture(3).draw(cursor, batch))] == whole
    assert ids(mixture(4).draw(0, 120)) != whole


def test_each_task_is_sampled_epoch_by_epoch() -> None:
    sampled = [prompt for prompt in mixture().draw(0, 400) if prompt.task == "0"]
    assert len(sampled) > 21
    for epoch in range(3):
        assert len(set(ids(sampled[7 * epoch : 7 * epoch + 7]))) == 7
    assert ids(sampled[:7]) != ids(sampled[7:14])


def test_a_single_task_is_sampled_as_without_a_mixture() -> None:
    part = mixture().parts[1]
    assert Mixture([part], [2.0], 5).draw(11, 50) == draw_prompts(part, 5, 11, 50)


def test_the_order_of_a_single_task_never_changes() -> None:
    """Runs started by an earlier version continue as they would have."""
    assert ids(draw_prompts(mixture().parts[0], 0, 0, 7)) == [f"0/{n}" for n in [1, 4, 5, 6, 3, 2, 0]]


def test_interleaved_parts_take_turns() -> None:
    assert interleaved([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
    assert interleaved([[1, 2, 3], [4], [5, 6]], 4) == [1, 4, 5, 2]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, rows in {"letters": ROWS[:9], "others": ROWS[9:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / f"{name}.jsonl") for name in ("letters", "others")]


def mixed(model: str, files: list[str], **changes: object) -> dict:
    first = {"name": files[0], "weight": 2.0, "held_out": 0.3}
    second = {"name": files[1], "held_out": 0.3}
    return {
        **recipe(model, evaluation__grader="exact_match", evaluation__questions=3, **changes),
        "mixture": [first, second, {**first, "weight": 0.5}],
    }


def read(data: dict, folder: Path) -> Data:
    return preflight(load_recipe(data), folder, False, ["exact_match"], None, NullProgress())


def test_ids_are_unique_if_a_file_is_listed_twice(files: list[str], tmp_path: Path) -> None:
    data = read(mixed("m", files), tmp_path / "run")
    assert [part.name for part in data.training] == [files[0], files[1], f"{files[0]}#2"]
    assert [part.name for part in data.eval_sets[0].parts] == [f"{name} (held out)" for name in files] + [
        f"{files[0]} (held out)#2"
    ]
    assert data.columns == ["answer"]


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (1, {"columns": {"prompt": "question"}}, ["mixture[1].columns", "question"]),
        (1, {"name": "none.jsonl"}, ["mixture[1].name", "none.jsonl", "no such file"]),
        (0, {"held_out": 0.0}, ["mixture[0].held_out = 0.1", "evaluation.task"]),
        (2, {"split": "dev"}, ["mixture[2].split", "dev"]),
    ],
)
def test_mistakes_name_the_table(files: list[str], tmp_path: Path, place: int, change: dict, words: list) -> None:
    data = mixed("m", files)
    data["mixture"][place] = {**data["mixture"][place], **change}
    with pytest.raises(UsageError) as caught:
        read(data, tmp_path / "run")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([{"name": "a"}, {"nam": "b"}], ["mixture[1].nam", 'did you mean "name"']),
        ([{"weight": 0.0}], ["mixture[0].weight = 0.0", "greater than 0"]),
        ({"name": "a"}, ["mixture", "[[mixture]]"]),
    ],
)
def test_mistakes_in_the_tables_themselves(mixture: object, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe({"model": {"name": "m"}, "mixture": mixture})
    for word in words:
        assert word in str(caught.value)


def test_rows_and_a_mixture_exclude_each_other(files: list[str], tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mixture"):
        train(mixed(tiny_folder, files), prompts=ROWS, out=tmp_path / "run")


class Killed(BaseException):
    """Stands for SIGKILL: none of our code catches it."""


def test_killed_and_resumed_mixture_equals_the_uninterrupted_run(
    tiny_folder: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed(tiny_folder, files, evaluation__every=2)
    result = train(data, out=tmp_path / "whole")
    calls = 0

    def dies(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("gruppo.training.run.TrainingRun._record_failures", dies)
        patch.setattr("gruppo.training.run.summarize", lambda *_: {})
        with pytest.raises(Killed):
            train(data, out=tmp_path / "run")
    train(data, out=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    line = result.metrics[1]
    assert {name for name in line if name.startswith("reward/task/")} <= {
        f"reward/task/{name}/mean" for name in (files[0], files[1], f"{files[0]}#2")
    }
    questions = fingerprint(tmp_path / "run")["evaluations"]["step-000006.parquet"]
    assert len({row["prompt_id"].rpartition("/")[0] for row in questions}) == 3, "the first questions cover all tasks"


def test_overlong_prompts_are_filtered_and_counted(tiny_folder: str, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "a" * 60, "answer": "a"}, {"prompt": "b" * 120, "answer": "b"}]
    task = {"overlong": "filter", "max_prompt_tokens": 50, "held_out": 0.3}
    progress = Notes()
    data = {**recipe(tiny_folder, run__steps=1, evaluation__grader="exact_match"), "task": task}
    train(data, prompts=rows, out=tmp_path / "run", progress=progress)
    events = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "filtered"]
    assert sum(event["prompts"] for event in events) == 2
    assert all(str(event["prompts"]) in event["message"] and event["task"] in event["message"] for event in events)
    assert any("left out" in note for note in progress.notes)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"max_prompt_tokens": 3}, ["row 19", "5 tokens", "task.max_prompt_tokens = 3", 'task.overlong = "filter"']),
        ({"max_prompt_tokens": 1, "overlong": "filter"}, ["task.overlong", "all 19", "longer than 1"]),
    ],
)
def test_overlong_prompts_are_refused(tiny_folder: str, tmp_path: Path, task: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        train({**recipe(tiny_folder), "task": task}, prompts=[*ROWS, {"prompt": "aaaaa"}], out=tmp_path / "run")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run" / "recipe.toml").exists()
