"""Records: a study without the folders of its runs and evaluations is the same study."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gruppo.errors import UsageError
from gruppo.runs.folder import RunFolder
from gruppo.study.arms import Study, load_study
from gruppo.study.evaluations import final_evaluation, plan_evaluations
from gruppo.study.plan import describe_plan
from gruppo.study.prune import prune
from gruppo.study.record_files import read_record, write_record
from gruppo.study.report import Report, write_report
from gruppo.study.runner import Outcome
from gruppo.study.states import keep_states, read_state, read_states
from gruppo.utils.progress import NullProgress
from tests.fuzzing import command
from tests.study.conftest import change, run


def delete_folders(study: Study) -> None:
    for one in study.runs:
        shutil.rmtree(one.folder, ignore_errors=True)
    shutil.rmtree(study.folder / "evaluations", ignore_errors=True)


def contents(report: Report) -> dict[str, bytes]:
    """The files of a report by name."""
    figures = [path.with_suffix(suffix) for path in report.figures for suffix in (".svg", ".png")]
    return {path.name: path.read_bytes() for path in (report.json, report.page, *figures)}


def plan(file: Path) -> str:
    return describe_plan(load_study(file), (), NullProgress(), checks=False)


@pytest.fixture
def alone(copied: Path) -> Path:
    """The file of a study that has only its records."""
    delete_folders(load_study(copied))
    return copied


def test_the_page_is_the_same_from_records_alone(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(copied, 'runs = "runs"', 'runs = "runs"\nrecords = "kept"')
    shutil.move(copied.parent / "runs/records", copied.parent / "kept")
    before = contents(write_report(load_study(copied)))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(copied, other)
    shutil.copytree(copied.parent / "kept", other / "kept")
    monkeypatch.setattr("gruppo.study.runner.run_recipe", None)
    monkeypatch.setattr("gruppo.study.evaluations.run_evaluation", None)
    assert run(other / copied.name) == Outcome()
    assert contents(write_report(load_study(other / copied.name))) == before
    assert len(before) == 8
    shown = plan(other / copied.name)
    assert "low/seed-1   stopped  record  " in shown
    assert "0 of 4 runs and 0 evaluations are left" in shown
    assert "low/seed-1   stopped  record and folder  " in plan(copied)


def test_records_are_small_and_written_again_with_the_same_bytes(copied: Path) -> None:
    study = load_study(copied)
    before = {path: path.read_bytes() for path in study.records.rglob("*") if path.is_file()}
    assert not [path for path in before if path.suffix in (".parquet", ".safetensors")]
    for one in study.runs:
        shutil.rmtree(study.records / one.name)
    shutil.rmtree(study.records / "evaluations")
    write_report(study)
    assert {path: path.read_bytes() for path in study.records.rglob("*") if path.is_file()} == before
    for one in study.runs:
        for name in ("metrics", "events"):
            kept = gzip.decompress((study.records / one.name / f"{name}.jsonl.gz").read_bytes())
            assert kept == (one.folder / f"{name}.jsonl").read_bytes()


def test_a_record_is_read_in_place_of_the_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of a run whose record is there are not read."""
    monkeypatch.setattr("gruppo.study.run_data.tokens_by_step", None)
    monkeypatch.setattr("gruppo.study.answer_data.read_table", None)
    states = write_report(load_study(copied)).content["runs"]
    assert {state["state"] for state in states} == {"stopped"}


def test_a_record_of_another_recipe_is_refused_with_the_field(alone: Path) -> None:
    change(alone, 'learning_rate" = 3e-2', 'learning_rate" = 2e-2')
    outcome = run(alone)
    assert set(outcome.failed) == {"high/seed-1", "high/seed-2"}
    assert "optimizer.learning_rate was 0.03 and is 0.02; restore it" in outcome.failed["high/seed-1"]
    assert "high/seed-1  refused  record  " in plan(alone)
    assert {name: state.state for name, state in read_states(load_study(alone)).items()} == {
        "low/seed-1": "stopped", "high/seed-1": "refused", "low/seed-2": "stopped", "high/seed-2": "refused",
    }  # fmt: skip


def test_a_record_below_a_larger_budget_is_of_no_use_without_its_folder(alone: Path) -> None:
    change(alone, "tokens = 150", "tokens = 200")
    state = read_state(load_study(alone), load_study(alone).runs[0])
    assert (state.state, state.complete) == ("missing", False)
    assert "and its folder is gone, so it is trained from the start" in plan(alone)
    change(alone, "tokens = 200", "tokens = 50")
    assert "which it reached with step" in plan(alone)


def test_a_run_that_went_on_is_recorded_again(copied: Path) -> None:
    study = load_study(copied)
    before = read_state(study, study.runs[0])
    change(copied, "tokens = 150", "tokens = 200")
    assert run(copied, only=["low"]).failed == {}
    study = load_study(copied)
    delete_folders(study)
    after = read_state(study, study.runs[0])
    assert after.complete
    assert after.recorded
    assert after.steps > before.steps


def test_a_run_without_model_that_has_not_answered_is_trained_again(alone: Path) -> None:
    study = load_study(alone)
    before = write_report(study).content["evaluations"]
    one = study.runs[0]
    done = final_evaluation(study, study.file.evaluations[0], one, read_state(study, one))
    shutil.rmtree(done.record)
    shown = plan(alone)
    assert "low/seed-1: its model is gone and has not answered letters, so it is trained again" in shown
    assert "1 of 4 runs and 1 evaluations are left" in shown
    assert run(alone) == Outcome()
    assert [path.parent.name for path in study.folder.glob("*/seed-*")] == ["low"]
    assert write_report(study).content["evaluations"] == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("metrics.jsonl.gz", flip),
    ("metrics.jsonl.gz", cut),
    ("metrics.jsonl.gz", Path.unlink),
    ("recipe.toml", flip),
    ("record.json", cut),
    ("record.json", lambda path: path.write_text("{}")),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_record_is_reported_with_the_fix(
    copied: Path, name: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the folder is there, it is used, and the record is written again."""
    study = load_study(copied)
    record = study.records / "low/seed-1"
    damage(record / name)
    assert read_state(study, study.runs[0]).complete
    assert f"{record / name}: is damaged" in plan(copied)
    assert "; the folder is used, and the record is written again" in plan(copied)
    keep_states(study)
    assert "is damaged" not in plan(copied)
    damage(record / name)
    delete_folders(study)
    monkeypatch.setattr("gruppo.study.runner.run_recipe", None)
    (why,) = run(copied).failed.values()
    assert why.startswith(f"{record / name}: is damaged")
    assert why.endswith(f"restore it from a copy, or delete {record} to train again")
    assert "| low/seed-1 | refused |" in write_report(study).page.read_text()


def test_a_damaged_record_of_an_evaluation_is_reported_with_the_fix(copied: Path) -> None:
    study = load_study(copied)
    planned = plan_evaluations(study, read_states(study))[0]
    flip(planned.record / "answers.jsonl.gz")
    assert "the folder is used, and the record is written again" in plan(copied)
    write_report(study)
    assert planned.remark == ""
    flip(planned.record / "answers.jsonl.gz")
    delete_folders(study)
    fix = f"restore it from a copy, or delete {planned.record} to evaluate again"
    assert fix in plan(copied)
    assert fix in run(copied).failed[planned.name]
    with pytest.raises(UsageError, match="to evaluate again"):
        write_report(study)


def another_ending(record: Path, name: str = "summary.json") -> None:
    """Make of a record one of another run."""
    kept = read_record(record, "")
    assert kept is not None
    content = json.loads(kept.files[name])
    content |= {"weights_sha256": "f" * 64} if name == "summary.json" else {"sets": {}}
    files = {**kept.files, name: json.dumps(content).encode()}
    write_record(record, {key: value for key, value in kept.facts.items() if key != "sha256"}, files)


def test_a_complete_folder_is_used_if_the_record_is_another_run(copied: Path) -> None:
    study = load_study(copied)
    before = contents(write_report(study))
    another_ending(study.records / "low/seed-1")
    evaluation = plan_evaluations(study, read_states(study))[0]
    another_ending(evaluation.record, "results.json")
    shown = plan(copied)
    assert "low/seed-1: record and folder have different runs" in shown
    assert "with weights ffffffffffff" in shown
    assert f"{evaluation.record}: its results are not those of {evaluation.folder}; the folder is used" in shown
    report = write_report(study)
    assert len(report.remarks) == 2
    assert contents(report) == before
    assert write_report(study).remarks == []


def test_a_record_is_used_if_the_folder_is_not_complete(copied: Path) -> None:
    study = load_study(copied)
    before = contents(write_report(study))
    (study.runs[0].folder / "summary.json").unlink()
    shown = plan(copied)
    assert "low/seed-1: the record is used, because it is complete, and the folder is not (unfinished" in shown
    assert f"to go on with the folder, delete {study.records / 'low/seed-1'}" in shown
    assert contents(write_report(study)) == before


def test_the_model_of_another_run_is_not_evaluated(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has a model, but of a run that has gone past the budget; the record is that of the budget."""
    study = load_study(copied)
    one, record = study.runs[0], study.records / study.runs[0].name
    done = final_evaluation(study, study.file.evaluations[0], one, read_state(study, one))
    shutil.copytree(record, tmp_path / "saved")
    change(copied, "tokens = 150", "tokens = 200")
    run(copied, only=["low"])
    change(copied, "tokens = 200", "tokens = 150")
    for folder in (done.folder, done.record, record):
        shutil.rmtree(folder)
    shutil.copytree(tmp_path / "saved", record)
    monkeypatch.setattr("gruppo.study.evaluations.run_evaluation", None)
    assert "which it reached with step" in run(copied, only=["low"]).failed["low/seed-1"]


def test_left_over_runs_are_on_the_page_without_their_folders(copied: Path) -> None:
    change(copied, 'name = "high"', 'name = "higher"')
    change(copied, 'arms = ["low", "high"]', 'arms = ["low", "higher"]')
    before = contents(write_report(load_study(copied)))
    assert b"| high/seed-1 | left over |" in before["study.md"]
    shutil.rmtree(copied.parent / "runs/high")
    assert contents(write_report(load_study(copied))) == before
    flip(copied.parent / "runs/records/high/seed-1/recipe.toml")
    assert "is damaged" in write_report(load_study(copied)).page.read_text()


def test_pruning_deletes_what_is_recorded_and_nothing_else(copied: Path) -> None:
    study = load_study(copied)
    before = contents(write_report(study))
    low, high, other, last = study.runs
    (high.folder / "notes.txt").write_text("mine")
    done = final_evaluation(study, study.file.evaluations[0], other, read_state(study, other))
    for folder in (done.folder, done.record):
        shutil.rmtree(folder)
    (last.folder / "rollouts/step-000001.parquet").unlink()
    code, printed, _ = command("study", str(copied), "--prune")
    assert code == 0
    assert [one.folder.is_dir() for one in study.runs] == [False, True, True, True]
    lines = printed.splitlines()
    assert lines[0].startswith(f"low/seed-1: deleted {low.folder} (")
    assert lines[1].startswith("high/seed-1: not deleted: ")
    assert "notes.txt was not written by the run" in lines[1]
    assert lines[2] == "low/seed-2: not deleted: its model has not answered letters; run the study first"
    assert lines[3].startswith("high/seed-2: not deleted: its tokens are not those of its record")
    assert lines[4].endswith(" freed")
    assert run(copied) == Outcome()
    assert contents(write_report(study))["study.md"] == before["study.md"]


def test_pruning_keeps_a_run_that_a_process_uses(copied: Path) -> None:
    study = load_study(copied)
    held = RunFolder(study.runs[0].folder)
    lines = prune(study, ["low"])
    held.close()
    assert "another run is writing to this folder" in lines[0]
    assert "low/seed-2: deleted" in lines[1]
    assert [one.folder.is_dir() for one in study.runs] == [True, True, False, True]


def test_pruning_that_is_killed_leaves_a_whole_run_or_none(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(copied)
    before = contents(write_report(study))
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.study.prune.shutil.rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(study)
    assert contents(write_report(study)) == before
    assert len(list(study.folder.glob(".deleted-*"))) == 1
    prune(study)
    assert not list(study.folder.glob(".deleted-*"))
    assert contents(write_report(study)) == before


@pytest.mark.parametrize(
    ("records", "refused"), [("runs", True), (".", True), ("runs/low/seed-1/x", True), ("x", False)]
)
def test_records_are_not_in_run_folders(finished: Path, tmp_path: Path, records: str, refused: bool) -> None:
    file = tmp_path / "study.toml"
    file.write_text(finished.read_text().replace("[study]", f'[study]\nrecords = "{records}"', 1))
    if not refused:
        assert load_study(file).records == tmp_path / "x"
        return
    with pytest.raises(UsageError, match=r'study.records = ".*": holds the runs, or lies in one; write another folder'):
        load_study(file)
