"""The disk space of a run is estimated, and a full disk loses nothing that was already written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from gruppo.errors import UsageError
from gruppo.runs.atomic import WriteError, writing
from gruppo.runs.folder import RunFolder
from gruppo.runs.reading import read_lines, read_table
from gruppo.training.api import train
from gruppo.utils.disk import held_bytes
from tests.cli.test_cli import ENVIRONMENT, recipe_file  # noqa: F401  # a fixture
from tests.small_runs import ROWS, at_call, fingerprint, recipe, small_run
from tests.training.test_iterations import rounds

EVALUATED = {"evaluation__task": "tests/functions_of_users.py:task", "evaluation__grader": "exact_match"}
FALLING = {"evaluation__grader": "tests/functions_of_users.py:right_at_first"}
RUNS: dict[str, Callable[[str], dict[str, Any]]] = {
    "grpo": lambda model: recipe(model, **EVALUATED),
    "an early best": lambda model: recipe(model, evaluation__every=2, run__steps=12, **EVALUATED | FALLING),
    "one checkpoint": lambda model: recipe(model, run__steps=2),
    "ppo": lambda model: _without_kl(recipe(model, method__name="ppo", sampling__max_tokens=30)),
    "lora": lambda model: recipe(model, model__lora={"rank": 2}),
    "iterations": lambda model: rounds(model, "outcome"),
    "long": lambda model: recipe(model, sampling__max_tokens=16, sampling__group_size=60, run__steps=3),
}


def _without_kl(data: dict[str, Any]) -> dict[str, Any]:
    del data["method"]["kl_coef"]
    return data


TABLES = ("rollouts", "evaluations", "labels")


@pytest.mark.parametrize("name", RUNS)
def test_the_disk_of_a_run_is_estimated(name: str, tiny_folder: str, tmp_path: Path) -> None:
    """Everything but tables is within a tenth, at the end of the run and at the peak, while a checkpoint is written.

    Tables are overestimated, because completions are shorter than the maximum, but by at most a factor of 1.5.
    """
    out, most = tmp_path / "run", [0]

    def tables() -> int:
        return sum(held_bytes(out / name) for name in TABLES)

    def look() -> None:
        most.append(held_bytes(out) - tables())

    with pytest.MonkeyPatch.context() as patch:
        for number in range(1, 30):
            at_call(patch, "gruppo.training.checkpoint.drop_old", number, look)
        train(RUNS[name](tiny_folder), prompts=ROWS, out=out, progress=False)
    estimate = json.loads((out / "environment.json").read_text())["disk_forecast"]
    of_tables = sum(estimate.get(name, 0) for name in TABLES)
    assert tables() <= of_tables <= 1.5 * tables()
    assert estimate["total"] - of_tables == pytest.approx(held_bytes(out) - tables(), rel=0.1)
    assert estimate["peak"] - of_tables == pytest.approx(max(most), rel=0.1)
    assert len(list((out / "checkpoints").iterdir())) <= estimate["kept"]


def test_checkpoint_and_model_are_estimated_separately(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run")
    estimate = json.loads((tmp_path / "run/environment.json").read_text())["disk_forecast"]
    assert estimate["checkpoint"] == pytest.approx(held_bytes(tmp_path / "run/checkpoints/step-000006"), rel=0.1)
    assert estimate["model"] == pytest.approx(held_bytes(tmp_path / "run/model"), rel=0.1)


def test_too_little_disk_is_refused_before_anything_is_written(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.training.disk_estimate.free_bytes", lambda _: 700_000)
        with pytest.raises(UsageError, match=r"run: only 0\.70 MB free, but the run needs .*: 2 checkpoints of 0\.\d+"):
            small_run(tiny_folder, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "rewards.log"]
    assert small_run(tiny_folder, tmp_path / "run").summary["state"] == "done"


class Notes:
    """A progress that keeps all notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextlib.contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
        yield lambda _: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, metrics: object) -> None:
        pass


def test_tables_that_may_not_fit_give_a_warning_also_on_resume(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, shown = recipe(tiny_folder, sampling__group_size=60), Notes()
    monkeypatch.setattr("gruppo.training.disk_estimate.free_bytes", lambda _: 1_000_000)
    train(settings, prompts=ROWS, out=tmp_path / "run", progress=shown)
    (note,) = (text for text in shown.notes if " MB free, " in text)
    assert "only 1.00 MB free, but the run may need" in note
    assert "tables of completions" in note
    monkeypatch.setattr("gruppo.training.disk_estimate.free_bytes", lambda _: 0)
    monkeypatch.setattr("gruppo.training.disk_estimate.held_bytes", lambda _: 0)
    train(settings, prompts=ROWS, out=tmp_path / "run", progress=shown, resume=True)
    assert "only 0.00 MB free, but the run may need" in shown.notes[-1]


@pytest.mark.parametrize(
    ("writer", "raises", "code"),
    [
        ("gruppo.training.shard_files.save_file", "rust", errno.ENOSPC),
        ("gruppo.models.weights.save_file", "rust", errno.EDQUOT),
        ("gruppo.runs.folder.pq.write_table", "system", errno.EDQUOT),
        ("gruppo.runs.folder.os.fsync", "system", errno.ENOSPC),
        ("gruppo.runs.folder.Path.write_bytes", "system", errno.ENOSPC),
        ("gruppo.runs.folder.Path.rename", "system", errno.EFBIG),
    ],
)
def test_a_failed_write_ends_the_run_and_loses_nothing(
    writer: str, raises: str, code: int, tiny_folder: str, uninterrupted: dict, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Libraries raise when half a file is written. It is removed, and the resumed run ends with the same result."""

    def full() -> None:
        for path in [*tmp_path.rglob(".writing-*/*"), *tmp_path.rglob("*.writing")]:
            os.truncate(path, path.stat().st_size // 2)
        text = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
        raise SafetensorError(text) if raises == "rust" else OSError(code, os.strerror(code))

    for moment in (3, 8):
        with monkeypatch.context() as patch, contextlib.suppress(WriteError):
            at_call(patch, writer, moment, full)
            small_run(tiny_folder, tmp_path / "run", resume=True)
        assert list((tmp_path / "run").rglob("*writing*")) == []
    small_run(tiny_folder, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == uninterrupted


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("whole") / "run"
    small_run(tiny_folder, out)
    return fingerprint(out)


def test_the_message_for_a_full_disk(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    at_call(monkeypatch, "gruppo.runs.folder.pq.write_table", 4, full)
    with pytest.raises(WriteError) as error:
        small_run(tiny_folder, tmp_path / "run")
    said = str(error.value)
    assert said.startswith(
        f"{tmp_path}/run/rollouts/step-000004.parquet: cannot be written: the disk is full (No space"
    )
    assert "GB free, the run needs about" in said
    assert said.endswith("MB more; the checkpoint of step 2 is intact")
    assert "\n" not in said
    assert json.loads((tmp_path / "run/summary.json").read_text())["state"] == "failed"


def test_a_partly_written_line_is_removed(tmp_path: Path) -> None:
    """The disk has space for a few bytes: the operating system accepts them, and fails at the next."""
    run = RunFolder(tmp_path / "run")
    run.metric({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"metrics\.jsonl: cannot be written: the file would be larger"):
            run.metric({"step": 2, "more": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.metrics() == [{"step": 1}]
    run.close()


def test_errors_not_from_the_operating_system_are_not_converted(tmp_path: Path) -> None:
    for error in (ValueError("no"), pa.ArrowInvalid("no column"), RuntimeError("os error")):
        with pytest.raises(type(error)), writing(tmp_path / "x"):
            raise error
    with pytest.raises(WriteError, match="Input/output error"), writing(tmp_path / "x"):
        raise OSError(errno.EIO, "Input/output error")


def command(recipe_file: Path, out: Path, *changes: str) -> list[str]:  # noqa: F811
    changed = [part for change in changes for part in ("--set", change)]
    return [sys.executable, "-m", "gruppo.cli.main", "train", str(recipe_file), *changed, "--out", str(out), "--resume"]


def check_failure(done: subprocess.CompletedProcess, out: Path) -> str:
    """Check for exit code 1, a one-line error, no traceback, and intact files only. Returns the line."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("gruppo: ")]
    assert "cannot be written" in line
    assert f"--out {out} --resume" in line
    assert list(out.rglob("*writing*")) == []
    for path in out.rglob("*.parquet"):
        read_table(path)
    read_lines(out / "metrics.jsonl")
    return line


def test_a_run_continues_after_a_full_file_system_has_space_again(
    recipe_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The command line on a tmpfs that another process fills during the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")

    def fill(room: int) -> None:
        space = os.statvfs(disk)
        (disk / "others").write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - room)))

    changes = ["run.steps=30"]
    try:
        out = disk / "run"
        run = command(recipe_file, out, *changes)
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step    3  reward"))
        fill(100_000)
        said, errors = process.communicate()
        line = check_failure(subprocess.CompletedProcess(run, process.returncode, said, errors), out)
        assert "the disk is full (No space left on device)" in line
        for room in (20_000, 250_000):
            (disk / "others").unlink()
            fill(room)
            with pytest.raises(WriteError, match=r"the disk is full .* is intact|there is no checkpoint yet"):
                train(recipe_file, overrides=changes, out=out, resume=True)
        (disk / "others").unlink()
        train(recipe_file, overrides=changes, out=out, resume=True)
        train(recipe_file, overrides=changes, out=tmp_path / "whole")
        assert fingerprint(out) == fingerprint(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_size_limit_ends_the_command_with_a_one_line_error(
    recipe_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Needs no root: no file may be larger than a checkpoint's weights, so writing the optimizer state fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    run = command(recipe_file, tmp_path / "run")
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit)
    line = check_failure(done, tmp_path / "run")
    assert "checkpoints/step-000002: cannot be written: the file would be larger than is allowed" in line
    assert "there is no checkpoint yet" in line
