"""Deleted, truncated and replaced parts of a run folder are mentioned: what is missing, what is lost, what still works.

A run never begins again at step 1 without a word.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from gruppo.errors import RunError, UsageError
from gruppo.runs.folder import RunFolder
from gruppo.runs.missing import missing_parts, saved_step, steps_text
from gruppo.runs.reading import read_lines
from gruppo.runs.results import load_result
from gruppo.runs.status import StatusFile
from gruppo.training.export import export
from gruppo.training.reproduce import reproduce
from tests.small_runs import ROWS, fingerprint, killed, small_run

STEPS = {"run__steps": 6, "run__checkpoint_every": 2, "task__held_out": 0.3, "evaluation__questions": 2,
         "evaluation__grader": "exact_match"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tiny_folder, tmp_path_factory.mktemp("whole") / "run", **STEPS).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def delete(*names: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def without_steps(*steps: int) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] not in steps]
        (run / "metrics.jsonl").write_text("".join(kept))

    return damage


READ = {
    "metrics": (delete("metrics.jsonl"), ["metrics.jsonl is missing; the metrics of steps 1 to 6 are lost"]),
    "the first metrics": (without_steps(0, 1, 2), ["metrics.jsonl has no metrics of steps 1 to 2; they are lost"]),
    "the last metrics": (without_steps(6), ["metrics.jsonl has no metrics of step 6; they are lost"]),
    "rollouts": (
        delete("rollouts/step-000002.parquet", "rollouts/step-000006.parquet"),
        ["rollouts/ has no table of steps 2 and 6; those completions are lost"],
    ),
    "all rollouts": (delete("rollouts"), ["rollouts/ has no table of steps 1 to 6; those completions are lost"]),
    "evaluations": (
        delete("evaluations/step-000000.parquet"), ["evaluations/ has no table of step 0; those answers are lost"],
    ),
    "checkpoints": (delete("checkpoints"), ["checkpoints/ is missing; the run cannot be resumed or exported"]),
    "model": (delete("model"), ["model/ is missing; resume the run to write it again, or export a checkpoint"]),
    "environment": (
        delete("environment.json"), ["environment.json is missing; the run cannot be resumed, exported or reproduced"],
    ),
    "doubled metrics": (
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2),
        ["metrics.jsonl has several lines of steps 1 to 6; this run did not write them"],
    ),
    "another environment": (
        lambda run: (run / "environment.json").write_text('{"a": 1}'),
        ["environment.json is not as the run wrote it; the run cannot be resumed, exported or reproduced"],
    ),
    "base": (delete("base"), ["base/ (config and tokenizer) is missing; the run cannot be exported"]),
    "config": (
        lambda run: (run / "base/config.json").write_text("{}"),
        ["base/config.json names no model type; the run cannot be exported"],
    ),
    "tokenizer": (
        delete("base/tokenizer.json"),
        ["base/ has no vocabulary of the tokenizer (tokenizer.json); the run cannot be exported"],
    ),
    "files that can be made again": (delete("status.json", "lock", "summary.json"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_readers_are_warned(name: str, run: Path) -> None:
    damage, problems = READ[name]
    assert missing_parts(run) == []
    damage(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = load_result(run)
    assert [str(warning.message) for warning in caught] == [f"{run}: {problem}" for problem in problems]
    assert result.missing == problems


def test_a_table_of_another_step_is_noticed(run: Path) -> None:
    shutil.copy(run / "rollouts/step-000002.parquet", run / "rollouts/step-000001.parquet")
    with pytest.warns(UserWarning, match=r"step-000001\.parquet: has the rows of step 2; it was replaced"):
        assert set(load_result(run).rollouts().step) == set(range(1, 7))


def test_a_frame_without_metrics_is_refused_and_the_rest_works(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is missing"):
        result = load_result(run)
    with pytest.raises(UsageError, match=r"metrics\.jsonl is missing.*rollouts\(\) and evaluations\(\) still work"):
        result.frame()
    assert set(result.rollouts().step) == set(range(1, 7))
    assert set(result.evaluations().step) == {0, 6}
    assert result.load_model() is not None
    assert export(run, run.parent / "to", progress=False).step == 6


def test_a_run_in_progress_lacks_nothing(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed(monkeypatch, "gruppo.runs.recorder.Recorder.step", 6):  # the table is written, the metrics are not
        small_run(tiny_folder, tmp_path / "run", **STEPS)
    assert missing_parts(tmp_path / "run") == []


RESUMED = {
    "metrics": (delete("metrics.jsonl"), "damaged", r"metrics\.jsonl is missing; its \d+ bytes .* goes on at step 7"),
    "rollouts": (delete("rollouts/step-000003.parquet"), "damaged", r"rollouts/step-000003\.parquet is missing"),
    "evaluations": (
        delete("evaluations/step-000000.parquet"),
        "damaged",
        r"evaluations/step-000000\.parquet is missing",
    ),
    "base": (delete("base"), "damaged", r"base/ .* is missing, and gruppo export needs it"),
    "the newest checkpoint": (delete("checkpoints/step-000006"), "checkpoint_unusable", "step-000006: is missing"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_records_what_is_missing(name: str, run: Path, tiny_folder: str) -> None:
    damage, kind, words = RESUMED[name]
    damage(run)
    small_run(tiny_folder, run, resume=True, **STEPS)
    events = [event for event in read_lines(run / "events.jsonl") if event["kind"] == kind]
    assert len(events) == 1
    assert re.search(words, events[0]["message"])


def test_deleted_events_are_mentioned(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.cut_back({"events.jsonl": 40, "metrics.jsonl": 0}, 3) == [
        "events.jsonl is missing; its 40 bytes are lost, and it goes on at step 4"
    ]
    folder.close()


def test_a_replaced_file_is_noticed(run: Path, tiny_folder: str) -> None:
    """The lines of another run, of the same length: of other steps, and one twice."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"step": 2', '"step": 3')
    lines[4] = lines[4].replace('"step": 4', '"step": 9')
    (run / "metrics.jsonl").write_text("".join(lines))
    small_run(tiny_folder, run, resume=True, **STEPS)
    messages = [event["message"] for event in read_lines(run / "events.jsonl") if event["kind"] == "damaged"]
    assert messages == [
        "metrics.jsonl has no metrics of steps 2 and 4; they are lost",
        "metrics.jsonl has lines of steps 3 and 9 that this run did not write",
    ]


def test_a_deleted_model_is_saved_again(run: Path, finished: Path, tiny_folder: str) -> None:
    shutil.rmtree(run / "model")
    small_run(tiny_folder, run, resume=True, **STEPS)
    assert (run / "model/model.safetensors").read_bytes() == (finished / "model/model.safetensors").read_bytes()
    assert fingerprint(run) == fingerprint(finished)


@pytest.mark.parametrize("also", [[], ["summary.json"], ["metrics.jsonl"]])
def test_a_run_without_its_checkpoints_does_not_begin_again(also: list[str], run: Path, tiny_folder: str) -> None:
    """The metrics or the summary alone show that there was a checkpoint."""
    delete("checkpoints", *also)(run)
    before = {path: path.read_bytes() for path in run.rglob("*.parquet")}
    with pytest.raises(RunError, match=r"the checkpoint of step [46] is missing, and all others; restore checkpoints/"):
        small_run(tiny_folder, run, resume=True, **STEPS)
    assert {path: path.read_bytes() for path in run.rglob("*.parquet")} == before
    assert (run / "metrics.jsonl").exists() == ("metrics.jsonl" not in also)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    finished: Path, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(monkeypatch, "gruppo.training.checkpointer.save_checkpoint", 1):
        small_run(tiny_folder, tmp_path / "run", **STEPS)
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == 3
    small_run(tiny_folder, tmp_path / "run", resume=True, **STEPS)
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


@pytest.mark.parametrize(
    ("checkpoint", "summary", "saved"), [(0, None, 0), (4, None, 4), (4, "done", 6), (4, "interrupted", 4)]
)
def test_the_last_step_that_was_saved_for_certain(
    checkpoint: int, summary: str | None, saved: int, tmp_path: Path
) -> None:
    assert saved_step(tmp_path) == 0
    StatusFile(tmp_path).update(now=True, checkpoint=checkpoint)
    if summary:
        (tmp_path / "summary.json").write_text(json.dumps({"state": summary, "steps": 6}))
    assert saved_step(tmp_path) == saved


def test_checkpoint_every_can_be_lowered_before_the_first_checkpoint(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for every, step in ((10, 4), (2, 1)):
        with killed(monkeypatch, "gruppo.training.loop.train_step", step):
            small_run(tiny_folder, run, resume=True, run__checkpoint_every=every)
    small_run(tiny_folder, run, resume=True, run__checkpoint_every=2)


def test_a_run_without_its_recipe(run: Path, tiny_folder: str) -> None:
    (run / "recipe.toml").unlink()
    with pytest.raises(UsageError, match=r"recipe\.toml is missing from this run; restore it"):
        small_run(tiny_folder, run, resume=True, **STEPS)


def test_lost_events_are_mentioned(run: Path, tiny_folder: str) -> None:
    small_run(tiny_folder, run, resume=True, **{**STEPS, "reward__timeout": 50.0, "run__checkpoint_every": 1})
    assert (run / "events.jsonl").stat().st_size
    (run / "events.jsonl").unlink()
    state = json.loads((run / "checkpoints/step-000006/state.json").read_text())
    state["lengths"]["events.jsonl"] = 40
    (run / "checkpoints/step-000006/state.json").write_text(json.dumps(state))
    assert missing_parts(run) == ["events.jsonl is missing; its events are lost"]


def test_export_without_base(run: Path) -> None:
    shutil.rmtree(run / "base")
    with pytest.raises(UsageError, match=r"base/ .* is missing; restore it from a copy, or use .*run/model"):
        export(run, run.parent / "to", progress=False)


def test_reproduce_says_what_is_missing(run: Path, finished: Path) -> None:
    def again(step: int) -> object:
        return reproduce(run, step, prompts=ROWS, trust=True, progress=False)

    without_steps(2)(run)
    result = again(3)
    assert result.equal  # type: ignore[attr-defined]
    assert "metrics.jsonl has no metrics of step 2, which were not compared" in result.notes  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"step = 2: .* has no metrics of such a step; it has steps 1 and 3 to 6"):
        again(2)
    (run / "rollouts/step-000003.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"step-000003\.parquet: is damaged"):
        again(3)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"metrics\.jsonl is missing, so there is nothing to compare a step with"):
        again(3)


def test_steps_as_text() -> None:
    assert [steps_text(steps) for steps in ([3], [1, 2], [5, 1, 2, 3], [1, 3, 5])] == [
        "step 3", "steps 1 to 2", "steps 1 to 3 and 5", "steps 1, 3 and 5",
    ]  # fmt: skip
    assert steps_text(range(1, 20, 2)) == "steps 1, 3, 5, 7, 9 and others"
