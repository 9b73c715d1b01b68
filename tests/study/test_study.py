"""A study from start to end: budget, resume, changes of its file, figures and page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.study.arms import load_study
from gruppo.study.attempts import read_attempts
from gruppo.study.evaluations import PlannedEvaluation
from gruppo.study.plan import describe_plan
from gruppo.study.report import write_report
from gruppo.study.runner import Outcome, StudyRunner
from gruppo.study.spending import BudgetCallback, tokens_by_step
from gruppo.study.states import read_state, read_states
from gruppo.training.callbacks import STOP
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Interrupted, stop_on_signals
from tests.fuzzing import command
from tests.small_runs import ROWS, at_call, fingerprint
from tests.study.conftest import STUDY, change, run, write_study


def test_runs_stop_after_the_step_that_reaches_the_budget(finished: Path) -> None:
    study = load_study(finished)
    assert [one.name for one in study.runs] == ["low/seed-1", "high/seed-1", "low/seed-2", "high/seed-2"]
    for one in study.runs:
        spent = [count for _, count in sorted(tokens_by_step(one.folder).items())]
        assert sum(spent[:-1]) < 150 <= sum(spent)
        summary = json.loads((one.folder / "summary.json").read_text())
        assert summary["state"] == "stopped"
        events = (one.folder / "events.jsonl").read_text()
        assert "the budget of 150 sampled tokens is spent" in events
    assert {state.state for state in read_states(study).values()} == {"stopped"}


def test_the_report_answers_the_questions(finished: Path) -> None:
    report = write_report(load_study(finished))
    learned, rates = report.content["questions"]
    assert learned["seeds"] == rates["seeds"] == [1, 2]
    assert learned["questions"] == 4
    assert learned["p_holm"] >= learned["p"]
    assert report.content["contamination"][0]["found"]["exact"] == 1, '"A1" is "a1", which is trained on'
    page = report.page.read_text()
    for words in (
        "What the page begins with.",
        "Nothing.",
        "two values on the training prompts",
        "low \\| rate",
        "`optimizer.learning_rate = 0.03`",
        "study-figures/reward.svg",
        "| high/seed-2 | stopped |",
    ):
        assert words in page
    assert set(report.content["evaluations"]["letters"]["metrics"]["accuracy"]) == {"initial", "low", "high"}
    assert [path.stem for path in report.figures] == ["reward", "bars", "samples"]


def interrupted(file: Path, target: str, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch, stop_on_signals(kills=True) as stop:
        at_call(patch, target, count, stop.request)
        StudyRunner(load_study(file), NullProgress(), stop).run()


def test_two_studies_give_the_same_files(finished: Path, tiny_folder: str, tmp_path: Path) -> None:
    """The second is interrupted within a run, and within an evaluation, and continues."""
    again = write_study(tmp_path / "b", tiny_folder)
    for target, count in (("gruppo.training.loop.train_step", 5), ("gruppo.evaluation.eval_run.grade_answers", 2)):
        with pytest.raises(Interrupted):
            interrupted(again, target, count)
        if count == 5:
            states = read_states(load_study(again))
            assert sorted(state.state for state in states.values()) == ["missing", "missing", "stopped", "unfinished"]
            assert "high/seed-1  unfinished  folder" in describe_plan(
                load_study(again), (), NullProgress(), checks=False
            )
    run(again)
    reports = [write_report(load_study(file)) for file in (finished, again)]
    for one, other in zip(*(load_study(file).runs for file in (finished, again)), strict=True):
        assert fingerprint(one.folder)["weights"] == fingerprint(other.folder)["weights"]
    for name in ("questions", "evaluations"):
        assert reports[0].content[name] == reports[1].content[name]
    for one, other in zip(*(report.figures for report in reports), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
        assert one.with_suffix(".png").read_bytes() == other.with_suffix(".png").read_bytes()
    assert {found["outcome"] for found in read_attempts(load_study(again).records)} == {
        "stopped",
        "done",
        "interrupted",
    }


def test_a_finished_study_does_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.study.runner.run_recipe", None)
    monkeypatch.setattr("gruppo.study.evaluations.run_evaluation", None)
    assert run(finished) == Outcome()
    assert "0 of 4 runs and 0 evaluations are left" in describe_plan(load_study(finished), (), NullProgress())


def test_an_interruption_at_the_end_of_the_budget_does_not_add_a_step(finished: Path) -> None:
    one = load_study(finished).runs[0]
    steps = len(tokens_by_step(one.folder))
    callback = BudgetCallback(one.budget, one.folder)
    assert callback.on_start(steps) is STOP
    assert callback.on_start(steps - 1) is None
    assert callback.on_start(0) is None


def test_a_changed_recipe_is_refused_with_the_field(copied: Path) -> None:
    change(copied, 'learning_rate" = 3e-2', 'learning_rate" = 2e-2')
    change(copied, "checkpoint_every = 1", "checkpoint_every = 3")
    outcome = run(copied)
    assert set(outcome.failed) == {"high/seed-1", "high/seed-2"}
    assert "optimizer.learning_rate was 0.03 and is 0.02" in outcome.failed["high/seed-1"]
    page = write_report(load_study(copied)).page.read_text()
    assert "| high/seed-1 | refused |" in page
    assert "no seed has both evaluations" in page


def test_a_larger_budget_goes_on_and_a_smaller_one_is_refused(copied: Path, finished: Path) -> None:
    study = load_study(copied)
    before = len(tokens_by_step(study.runs[0].folder))
    change(copied, "tokens = 150", "tokens = 200")
    assert run(copied, only=["low"]).failed == {}
    assert len(tokens_by_step(study.runs[0].folder)) > before
    assert read_state(load_study(copied), load_study(copied).runs[0]).state == "stopped"
    change(copied, "tokens = 200", "tokens = 50")
    outcome = run(copied)
    assert "which it reached with step" in outcome.failed["low/seed-1"]


def test_what_is_left_over_or_failed_is_listed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(copied, 'name = "high"', 'name = "higher"')
    change(copied, 'arms = ["low", "high"]', 'arms = ["low", "higher"]')
    change(copied, "tests/rewards/functions.py:likes_letters", "tests/rewards/functions.py:no_such_function")
    outcome = run(copied, only=["higher"])
    assert "no_such_function" in outcome.failed["higher/seed-1"]
    page = write_report(load_study(copied)).page.read_text()
    assert "| high/seed-1 | left over |" in page
    assert "higher/seed-1: failed (" in page


def test_a_damaged_folder_that_is_left_over_does_not_stop_the_study(copied: Path) -> None:
    study = load_study(copied)
    folder = study.runs[1].folder
    assert study.runs[1].name == "high/seed-1"
    shutil.rmtree(study.records)
    next((folder / "rollouts").glob("*.parquet")).write_bytes(b"PAR1")
    change(copied, 'name = "high"', 'name = "higher"')
    change(copied, 'arms = ["low", "high"]', 'arms = ["low", "higher"]')
    assert "| high/seed-1 | left over |" in write_report(load_study(copied)).page.read_text()


def test_an_evaluation_without_memory_fails_once_and_the_study_goes_on(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def without_memory(planned: PlannedEvaluation, *_: Any) -> None:
        tried.append(planned.name)
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    change(copied, "questions = 4", "questions = 3")
    monkeypatch.setattr(PlannedEvaluation, "perform", without_memory)
    outcome = run(copied)
    assert sorted(tried) == sorted(set(tried)) == sorted(outcome.left)
    assert len(tried) == 5, "of both arms with both seeds, and before training"
    assert all("out of memory" in why for why in outcome.failed.values())


def test_a_run_of_epochs_is_complete_after_its_last_step(tiny_folder: str, tmp_path: Path) -> None:
    """The number of its steps follows from the data; the file's run.steps has its default."""
    text = STUDY.split("[[arms]]")[0].replace("steps = 9", "epochs = 1") + '[[arms]]\nname = "one"\nseeds = [1]\n'
    file = write_study(tmp_path / "c", tiny_folder, 10**6, text)
    outcome = run(file)
    assert (outcome.failed, outcome.left) == ({}, [])
    state = read_state(load_study(file), load_study(file).runs[0])
    assert state.complete
    assert state.notes == [f"its {len(ROWS) // 2} steps ended before its budget of 1,000,000 sampled tokens"]


def test_minutes_are_kept(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(copied, "seeds = [1, 2]", "seeds = [1, 2, 3]")
    monkeypatch.setattr("gruppo.study.runner.run_recipe", None)
    outcome = run(copied, minutes=1e-6)
    assert outcome.left == ["low/seed-3", "high/seed-3"]
    with pytest.raises(UsageError, match=r"--only none|only = none"):
        run(copied, only=["none"])


def test_a_run_that_takes_too_long_is_interrupted_after_a_step(tiny_folder: str, tmp_path: Path) -> None:
    file = write_study(tmp_path / "c", tiny_folder, text=STUDY.split("[[evaluations]]")[0])
    with pytest.MonkeyPatch.context() as patch, stop_on_signals(kills=True) as stop:
        patch.setattr(StudyRunner, "_fits", lambda *_: True)  # as if the estimate had been too short
        runner = StudyRunner(load_study(file), NullProgress(), stop, minutes=1e-6)
        with pytest.raises(Interrupted):
            runner.run()
    (attempt,) = read_attempts(load_study(file).records)
    assert attempt["outcome"] == "interrupted"
    state = read_state(load_study(file), load_study(file).runs[0])
    assert (state.state, state.steps) == ("unfinished", 1)
    assert run(file).left == []


def test_the_command_line(finished: Path) -> None:
    code, printed, _ = command("study", str(finished), "--plan")
    assert code == 0
    assert "0 of 4 runs and 0 evaluations are left" in printed
    code, printed, _ = command("study", str(finished))
    assert code == 0
    assert "learned: Is it better than before?" in printed
    assert "study.md" in printed
    for options, words in (
        (["--plan", "--report"], "--plan: only shows what is left"),
        (["--plan", "--minutes", "5"], "--minutes 5: --plan trains nothing"),
        (["--report", "--minutes", "5"], "--minutes 5: --report trains nothing"),
        (["--report", "--only", "eight"], "--only eight: the page of --report holds all arms"),
        (["--prune", "--minutes", "5"], "--minutes 5: --prune trains nothing"),
        (["--minutes", "0"], "--minutes 0: must be more than 0"),
        (["--only", "none"], "--only none: is no arm"),
    ):
        code, _, error = command("study", str(finished), *options)
        assert code == 2
        assert words in error
