"""What the pages say of a run's recipe, machine, files and commands."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.runs.screen import State
from gruppo.ui import details
from gruppo.ui.catalog import Card, Catalog
from tests.ui.made import RECIPE, make_run, rollout_row, write_answers, write_rollouts


def card(path: Path, state: str = "done") -> Card:
    found = Catalog(path).cards()[0]
    return replace(found, path=path, state=State(state, state))


# ---------------------------------------------------------------- recipe


def test_fields_that_differ_from_the_defaults_of_the_method(tmp_path: Path) -> None:
    changed = (
        RECIPE
        + "[method]\nname = 'dapo'\nkl_coef = 0.5\n[sampling]\ngroup_size = 3\n[optimizer]\nmax_grad_norm = 1.0\n"
    )
    found = {field: (value, default) for field, value, default in details.changed_fields(make_run(tmp_path, changed))}
    assert found["method.kl_coef"] == (0.5, 0.0)  # DAPO's default
    assert found["sampling.group_size"][0] == 3
    assert found["run.steps"][0] == 10
    assert not {"run.name", "model.name", "task.name", "method.name", "method.clip_high"} & found.keys()


def test_a_recipe_of_defaults_differs_in_nothing(tmp_path: Path) -> None:
    recipe = RECIPE.replace("steps = 10\n", "")
    assert details.changed_fields(make_run(tmp_path, recipe)) == []


def test_optional_tables_are_compared_with_their_own_defaults(tmp_path: Path) -> None:
    found = details.changed_fields(make_run(tmp_path, RECIPE + "[evaluation]\nquestions = 7\n"))
    assert [field for field, _, _ in found] == ["evaluation.questions", "run.steps"]


@pytest.mark.parametrize("recipe", ["[run", "", "[run]\nsteps = 'x'", "a = " + "[" * 3_000, "[model]\nname = 5"])
def test_a_damaged_recipe_is_named(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        details.changed_fields(make_run(tmp_path, recipe))


def test_a_recipe_that_is_too_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        details.changed_fields(make_run(tmp_path, RECIPE + "#" * 2**20))


# ---------------------------------------------------------------- machine


def test_the_machine(tmp_path: Path) -> None:
    environment = {"platform": "Linux", "cores": 2, "memory_bytes": 24e9, "accelerator": None, "python": "3.11",
                   "packages": {"torch": "2.0"}, "chosen": {"micro_batch_tokens": 4096}}  # fmt: skip
    assert details.machine(make_run(tmp_path, environment=environment)) == [
        ("platform", "Linux"), ("cores", "2"), ("memory", "24.0 GB"), ("python", "3.11"), ("torch", "2.0"),
        ("micro batch tokens", "4096"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [{}, {"packages": 5, "chosen": [], "memory_bytes": "x"}, {"memory_bytes": True}, {"memory_bytes": -1}],
)
def test_machines_of_strangers(tmp_path: Path, environment: dict[str, Any]) -> None:
    for name, value in details.machine(make_run(tmp_path, environment=environment)):
        assert isinstance(name, str)
        assert isinstance(value, str)


@pytest.mark.parametrize("content", [None, b"[1]", b"{", b"\xff"])
def test_a_machine_that_was_not_recorded(tmp_path: Path, content: bytes | None) -> None:
    run = make_run(tmp_path)
    if content is not None:
        (run / "environment.json").write_bytes(content)
    assert details.machine(run) == []


# ---------------------------------------------------------------- files


def test_files_to_download(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary={})
    write_rollouts(run, rollout_row(), step=3)
    write_answers(run, step=3)
    (run / "model").mkdir()
    (run / "model/weights.safetensors").write_bytes(b"x")
    (run / "secret.txt").write_text("x")
    (run / "rollouts/other.parquet").write_text("x")
    found = details.files(run)
    assert set(found) == {
        "recipe.toml", "metrics.jsonl", "events.jsonl", "summary.json", "rollouts/step-000003.parquet",
        "evaluations/step-000003.parquet",
    }  # fmt: skip
    assert all(path == run / name for name, path in found.items())


def test_every_table_can_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page lists the last ones, but a link to an older one works too."""
    monkeypatch.setattr(details, "_MOST_FILES", 1)
    (tmp_path / "rollouts").mkdir()
    for name in ("step-000001.parquet", "step-000002.parquet", "step-1.parquet", "notes.parquet", "step-000003"):
        (tmp_path / "rollouts" / name).write_text("")
    assert list(details.files(tmp_path)) == ["rollouts/step-000002.parquet"]
    assert details.file(tmp_path, "rollouts/step-000001.parquet") == tmp_path / "rollouts/step-000001.parquet"
    others = ("step-1.parquet", "notes.parquet", "step-000003", "", "step-000004.parquet", "../step-000001.parquet")
    for name in (*(f"rollouts/{other}" for other in others), "rollouts", "", "status.json"):
        assert details.file(tmp_path, name) is None


def test_files_cannot_leave_the_folder(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside", summary={}, environment={})
    write_rollouts(outside, rollout_row())
    run = make_run(tmp_path / "run")
    (run / "summary.json").symlink_to(outside / "summary.json")
    (run / "environment.json").symlink_to("../outside/environment.json")
    (run / "evaluations").mkdir()
    (run / "evaluations/step-000001.parquet").symlink_to(outside / "rollouts/step-000001.parquet")
    (run / "rollouts").symlink_to(outside / "rollouts")
    os.mkfifo(run / "evaluations/step-000002.parquet")
    (run / "results.json").mkdir()
    assert set(details.files(run)) == {"recipe.toml", "metrics.jsonl", "events.jsonl"}


def test_the_last_tables_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(details, "_MOST_FILES", 2)
    run = make_run(tmp_path)
    for step in (1, 2, 10):
        write_rollouts(run, rollout_row(), step=step)
    assert [name for name in details.files(run) if "/" in name] == [
        "rollouts/step-000002.parquet",
        "rollouts/step-000010.parquet",
    ]


# ---------------------------------------------------------------- commands


def told(path: Path, state: str, last_step: int = 4) -> dict[str, list[str]]:
    return {words: shlex.split(command) for words, command in details.commands(card(path, state), last_step)}


@pytest.mark.parametrize("state", ["interrupted", "failed", "silent", "unfinished"])
def test_a_run_that_did_not_end_can_be_resumed(tmp_path: Path, state: str) -> None:
    run = make_run(tmp_path / "a run; $(id) 'x'")
    resume = told(run, state)["Resume"]
    assert resume == ["gruppo", "train", str(run / "recipe.toml"), "--out", str(run), "--resume"]


def test_a_finished_run_can_be_exported_and_reproduced(tmp_path: Path) -> None:
    found = told(make_run(tmp_path, RECIPE + "[evaluation]\n"), "done")
    assert found["Export it"][:3] == ["gruppo", "export", str(tmp_path)]
    assert found["Compute a step again"] == ["gruppo", "reproduce", str(tmp_path), "--step", "4"]
    assert {"Evaluate it", "On one screen", "As one file"} <= found.keys()
    assert "Resume" not in found
    assert "Compute a step again" not in told(tmp_path, "done", 0)


def test_a_running_run_is_not_resumed_or_exported(tmp_path: Path) -> None:
    assert set(told(make_run(tmp_path), "running", 0)) == {"On one screen", "As one file"}


def test_a_damaged_run_can_still_be_shown(tmp_path: Path) -> None:
    assert set(told(make_run(tmp_path, "[run"), "failed")) == {"On one screen", "As one file"}


@pytest.mark.parametrize("name", ["a\nb", "a\u202eb", "\u200b", "a\x1b[31m"])
def test_no_command_with_a_name_that_hides_characters(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / name)
    write_rollouts(run, rollout_row())
    assert details.commands(card(run), 1) == []


@pytest.mark.parametrize("prompt", [None, "", "[" * 100_000, "[1]", '[{"role": 5}]', "x" * 10_000])
def test_prompts_of_strangers_in_a_command(tmp_path: Path, prompt: str | None) -> None:
    run = make_run(tmp_path)
    write_rollouts(run, rollout_row(prompt=prompt), step=4)
    assert told(run, "done")["Sample from the model"][:3] == ["gruppo", "sample", str(run)]


@pytest.mark.parametrize("kind", ["a pipe", "a link"])
def test_only_tables_of_the_run_are_read_for_a_command(tmp_path: Path, kind: str) -> None:
    outside = write_rollouts(tmp_path / "other", rollout_row(prompt="secret"), step=4)
    run = make_run(tmp_path / "run")
    (run / "rollouts").mkdir()
    if kind == "a pipe":
        os.mkfifo(run / "rollouts" / outside.name)
    else:
        (run / "rollouts" / outside.name).symlink_to(outside)
    found = told(run, "done")
    assert found["On one screen"] == ["gruppo", "show", str(run)]
    assert not any("secret" in words for words in found.values())
