"""Arms that begin with the model that another arm has trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gruppo.errors import UsageError
from gruppo.preflight import check
from gruppo.runs.eval_metrics import accuracies
from gruppo.runs.reading import read_object
from gruppo.study.arms import PlannedRun, Study, load_study
from gruppo.study.attempts import read_attempts
from gruppo.study.contamination_check import contamination_of
from gruppo.study.evaluations import evaluations_of, initial_evaluation
from gruppo.study.figures import models_of
from gruppo.study.plan import describe_plan
from gruppo.study.prune import prune
from gruppo.study.recall_check import recall_of
from gruppo.study.record_files import read_record, write_record
from gruppo.study.report import write_report
from gruppo.study.runner import Outcome
from gruppo.study.states import RunState, read_states
from gruppo.training.api import run_recipe
from gruppo.utils.progress import NullProgress
from tests.fuzzing import command
from tests.small_runs import ROWS
from tests.study.conftest import STUDY, change, run, write_study

SHORT = STUDY.split("[[arms]]")[0].replace("tokens = {tokens}", "steps = 2")
STARTS = f"""{SHORT}
[[arms]]
name = "grpo"
start = "sft"

[[arms]]
name = "slow"
seeds = [1]
start = "sft"
budget = {{{{ steps = 1 }}}}
changes = {{{{ "optimizer.learning_rate" = 3e-4 }}}}

[[arms]]
name = "sft"
label = "SFT"
seeds = [1]
budget = {{{{ steps = 1 }}}}

[arms.recipe]
run.checkpoint_every = 1
model = {{{{ name = "{{model}}", device = "cpu", dtype = "float32" }}}}
task.name = "{{folder}}/shown.jsonl"
reward.functions = []
method.name = "sft"
sampling = {{{{ prompts_per_step = 2, max_tokens = 8 }}}}
optimizer.learning_rate = 3e-2

[[arms]]
name = "plain"
seeds = [1]
budget = {{{{ steps = 1 }}}}

[[evaluations]]
task = "{{test}}"
name = "letters"
grader = "exact_match"
samples = 2
max_tokens = 2
decoding = {{{{ temperature = 1.0 }}}}

[[questions]]
id = "learned"
text = "Is it better than its start?"
metric = "letters/accuracy"
arms = ["initial", "grpo"]

[[figures]]
name = "all"
kind = "bars"
metric = "letters/accuracy"

[[figures]]
name = "some"
kind = "samples"
evaluation = "letters"
arms = ["slow", "grpo"]
"""


def write(folder: Path, model: str) -> Path:
    """The file of the study. Only its SFT trains on a question of the evaluation."""
    file = write_study(folder, model, text=STARTS.replace("{folder}", str(folder)))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    shown = [{**row, "completion": f"{row['answer']}z"} for row in ROWS[:4]]
    (folder / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    return file


@pytest.fixture(scope="module")
def trained(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study that has run. Tests change copies of it only."""
    file = write(tmp_path_factory.mktemp("starts") / "a", tiny_folder)
    assert run(file) == Outcome()
    return file


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained.parent, tmp_path / "study")
    file = tmp_path / "study" / "study.toml"
    for name in ("train", "shown", "test"):  # the rows stay where they are
        assert str(trained.parent / f"{name}.jsonl") in file.read_text()
    return file


@pytest.fixture
def fresh(tiny_folder: str, tmp_path: Path) -> Path:
    """The file of a study that has not run."""
    return write(tmp_path / "fresh", tiny_folder)


def plan(file: Path, *only: str) -> str:
    return describe_plan(load_study(file), only, NullProgress(), checks=False)


def named(study: Study, name: str) -> PlannedRun:
    return next(one for one in study.runs if one.name == name)


def forget(study: Study, name: str, *, answers: bool = True) -> None:
    """Delete folder and record of a run, and its answers."""
    shutil.rmtree(study.folder / name)
    shutil.rmtree(study.records / name)
    for root in (study.folder, study.records) if answers else ():
        for folder in root.glob(f"evaluations/letters/{name.replace('/', '-')}-*"):
            shutil.rmtree(folder)


def test_starts_come_first_and_have_the_same_seed_or_the_first(fresh: Path) -> None:
    study = load_study(fresh)
    names = ["sft/seed-1", "grpo/seed-1", "slow/seed-1", "plain/seed-1", "grpo/seed-2"]
    assert [one.name for one in study.runs] == names
    assert [one.start.name if one.start else None for one in study.runs] == [
        None, "sft/seed-1", "sft/seed-1", None, "sft/seed-1",
    ]  # fmt: skip
    change(fresh, "seeds = [1]\nbudget = { steps = 1 }\n\n[arms.recipe]", "seeds = [3, 2]\n[arms.recipe]")
    study = load_study(fresh)
    assert [(one.name, one.start.name) for one in study.runs if one.start] == [
        ("grpo/seed-1", "sft/seed-3"), ("slow/seed-1", "sft/seed-3"), ("grpo/seed-2", "sft/seed-2"),
    ]  # fmt: skip
    recipe = named(study, "grpo/seed-2").recipe
    assert recipe.model.name == str((study.folder / "sft/seed-2/model").resolve())
    assert recipe.model.dtype == "float32"


def test_runs_begin_with_the_weights_of_their_start_and_end_at_their_budget(trained: Path) -> None:
    study = load_study(trained)
    for one in study.runs:
        assert read_object(one.folder / "summary.json")["steps"] == (2 if one.arm.name == "grpo" else 1)
        begun = read_object(one.folder / "environment.json")["start_weights_sha256"]
        if one.start is not None:
            assert begun == read_object(one.start.folder / "summary.json")["weights_sha256"]
            assert begun != read_object(one.start.folder / "environment.json")["start_weights_sha256"]


def test_initial_is_the_model_of_the_start(trained: Path) -> None:
    """It is evaluated once for all arms with the same settings, and the arm's own settings count."""
    study = load_study(trained)
    states = read_states(study)
    done = [attempt["name"] for attempt in read_attempts(study.records) if attempt["name"].startswith("letters of ")]
    assert sorted(done) == sorted([
        "letters of initial", "letters of initial",  # as SFT evaluates, and as the others do
        "letters of sft/seed-1", "letters of sft/seed-1 with the settings of grpo",
        "letters of grpo/seed-1", "letters of grpo/seed-2", "letters of slow/seed-1", "letters of plain/seed-1",
    ])  # fmt: skip
    (table,) = study.file.evaluations
    planned = [initial_evaluation(study, table, one, states) for one in study.runs if one.start]
    assert len({one.folder for one in planned}) == 1
    found = read_object(planned[0].folder / "environment.json")["weights_sha256"]
    assert found == states["sft/seed-1"].weights
    content = write_report(study).content
    trained_means = content["evaluations"]["letters"]["metrics"]["accuracy"]["grpo"]["seeds"].values()
    before = accuracies(planned[0].questions()).mean()
    assert content["questions"][0]["difference"] == pytest.approx(np.mean(list(trained_means)) - before)


def test_an_evaluation_of_the_start_counts_for_arms_that_evaluate_alike(fresh: Path) -> None:
    change(fresh, f"{fresh.parent}/shown.jsonl", f"{fresh.parent}/train.jsonl")
    study = load_study(fresh)
    assert len(evaluations_of(study, study.runs[0], RunState("sft/seed-1"))) == 1


def test_the_page_shows_starts_and_budgets(trained: Path) -> None:
    report = write_report(load_study(trained))
    page = report.page.read_text()
    (learned,) = report.content["questions"]
    assert learned["seeds"] == [1, 2]
    assert "SFT" in learned["answer"]
    assert "before training" not in learned["answer"]
    for words in (
        "`letters/accuracy`: grpo minus SFT",
        "Every run has a budget of 2 steps, unless the table has another.",
        "| grpo | the recipe in the study's file | none | SFT | 2 steps | 1, 2 |",
        "| slow | the recipe in the study's file | `optimizer.learning_rate = 0.0003` | SFT | 1 steps | 1 |",
        "| its recipe's model | 1 steps | 1 |",
        "| before training (SFT) |",
        "| before training (plain) |",
    ):
        assert words in page
    assert "began with" not in page
    assert [path.stem for path in report.figures] == ["all", "some"]


def test_figures_show_what_the_arms_begin_with(fresh: Path) -> None:
    study = load_study(fresh)
    whole, some = study.file.figures
    assert [(name, initial, title) for name, initial, title, _ in models_of(study, whole)] == [
        ("sft", True, "before training (SFT)"), ("plain", True, "before training (plain)"),
        ("grpo", False, "grpo"), ("slow", False, "slow"), ("sft", False, "SFT"), ("plain", False, "plain"),
    ]  # fmt: skip
    assert [(name, initial, title) for name, initial, title, _ in models_of(study, some)] == [
        ("grpo", True, "SFT"), ("grpo", False, "grpo"), ("slow", False, "slow"),
    ]  # fmt: skip


def test_training_questions_of_the_start_count(trained: Path) -> None:
    found = {tuple(entry["arms"]): entry["found"] for entry in contamination_of(load_study(trained))}
    assert {arms: (one["training"], one["exact"]) for arms, one in found.items()} == {
        ("grpo", "slow"): (21, 1), ("sft",): (4, 1), ("plain",): (17, 0),
    }  # fmt: skip


def test_recall_is_measured_of_untrained_models_alone(fresh: Path) -> None:
    change(fresh, "samples = 2\n", "samples = 2\nrecall = true\n")
    assert [entry["arms"] for entry in recall_of(load_study(fresh))] == [["sft"], ["plain"]]


def test_a_finished_study_that_has_moved_does_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipes name a folder that is elsewhere now."""
    monkeypatch.setattr("gruppo.study.runner.run_recipe", None)
    monkeypatch.setattr("gruppo.study.evaluations.run_evaluation", None)
    assert run(copy) == Outcome()
    shown = plan(copy)
    assert "0 of 5 runs and 0 evaluations are left" in shown
    assert "grpo begins with sft" in shown


@pytest.mark.parametrize(("old", "new"), [('start = "sft"\n\n', "\n"), ('start = "sft"\n\n', 'start = "plain"\n\n')])
def test_another_start_is_refused(copy: Path, old: str, new: str) -> None:
    change(copy, old, new)
    state = read_states(load_study(copy))["grpo/seed-1"]
    assert state.state == "refused"
    assert state.notes[0].startswith("model.name was ")
    assert read_states(load_study(copy))["slow/seed-1"].state == "done"


def test_a_start_without_folder_is_trained_again_for_a_run_that_needs_it(copy: Path) -> None:
    study = load_study(copy)
    before = write_report(study).content
    shutil.rmtree(named(study, "sft/seed-1").folder)
    assert "0 of 5 runs and 0 evaluations are left" in plan(copy)
    assert run(copy) == Outcome()
    assert not named(study, "sft/seed-1").folder.exists()
    forget(study, "grpo/seed-2")
    shown = plan(copy)
    assert "sft/seed-1: its model is gone and is the start of grpo/seed-2, so it is trained again" in shown
    assert "2 of 5 runs and 1 evaluations are left" in shown
    assert run(copy) == Outcome()
    after = write_report(study).content
    for content in (before, after):
        for state in content["runs"]:
            state["seconds"] = 0.0
    for name in ("runs", "evaluations", "questions"):
        assert after[name] == before[name]


def test_a_run_that_goes_on_says_that_its_start_was_trained_again(copy: Path) -> None:
    study = load_study(copy)
    weights = named(study, "sft/seed-1").model / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    change(copy, "budget = { steps = 1 }\nchanges", "budget = { steps = 2 }\nchanges")
    code, _, shown = command("study", str(copy), "--only", "slow")
    assert code == 1
    folder = named(study, "slow/seed-1").folder
    assert (
        "slow/seed-1 failed: the weights of the initial model are not those that this run started with; restore them, "
        f"or delete {folder} to train it from the start"
    ) in shown


def test_starts_of_starts_are_trained_again(copy: Path) -> None:
    study = load_study(copy)
    forget(study, "slow/seed-1")
    change(copy, 'seeds = [1]\nstart = "sft"', 'seeds = [1]\nstart = "grpo"')
    for name in ("sft/seed-1", "grpo/seed-1", "grpo/seed-2"):
        shutil.rmtree(named(study, name).folder)
    shown = plan(copy)
    assert "sft/seed-1: its model is gone and is the start of grpo/seed-1, so it is trained again" in shown
    assert "grpo/seed-1: its model is gone and is the start of slow/seed-1, so it is trained again" in shown
    assert "3 of 5 runs and 1 evaluations are left" in shown
    study = load_study(copy)
    assert [one.name for one in study.selected(["slow"])] == ["sft/seed-1", "grpo/seed-1", "slow/seed-1"]


def test_a_start_without_folder_is_trained_again_for_an_evaluation(copy: Path) -> None:
    study = load_study(copy)
    shutil.rmtree(named(study, "sft/seed-1").folder)
    (table,) = study.file.evaluations
    planned = initial_evaluation(study, table, named(study, "slow/seed-1"), read_states(study))
    shutil.rmtree(planned.folder)
    shutil.rmtree(planned.record)
    assert "sft/seed-1: its model is gone and has not answered letters, so it is trained again" in plan(copy)


def test_runs_count_if_their_start_was_trained_again_with_other_weights(copy: Path) -> None:
    study = load_study(copy)
    shutil.rmtree(named(study, "sft/seed-1").folder)
    record = study.records / "sft/seed-1"
    kept = read_record(record, "")
    assert kept is not None
    summary = {**json.loads(kept.files["summary.json"]), "weights_sha256": "f" * 64}
    facts = {name: value for name, value in kept.facts.items() if name != "sha256"}
    write_record(record, facts, {**kept.files, "summary.json": json.dumps(summary).encode()})
    states = read_states(study)
    assert states["grpo/seed-1"].complete
    begun = read_object(named(study, "grpo/seed-1").folder / "environment.json")["start_weights_sha256"]
    note = f"began with weights {begun[:12]}, and the start that is there has weights ffffffffffff"
    assert f"grpo/seed-1: {note}" in plan(copy)
    page = write_report(study).page.read_text()
    assert page.count(note) == 3
    environment = {**json.loads(kept.files["environment.json"]), "chosen": {"dtype": "bfloat16"}}
    write_record(record, facts, {**kept.files, "environment.json": json.dumps(environment).encode()})
    assert "in float32, which cannot be compared with those of its start, in bfloat16" in plan(copy)


def test_pruning_keeps_a_start_that_is_needed(copy: Path) -> None:
    study = load_study(copy)
    start = named(study, "sft/seed-1").folder
    forget(study, "grpo/seed-2")
    lines = prune(study)
    assert lines[0] == "sft/seed-1: not deleted: grpo/seed-2 will begin with its model; run the study first"
    assert start.is_dir()
    assert not named(study, "grpo/seed-1").folder.exists()
    assert run(copy) == Outcome()
    assert prune(study)[0].startswith("sft/seed-1: deleted ")
    assert not start.exists()


def test_only_includes_the_start(fresh: Path) -> None:
    shown = plan(fresh, "slow")
    assert "sft is included, because --only slow begins with it" in shown
    assert "2 of 5 runs and " in shown
    assert [one.name for one in load_study(fresh).selected(["slow"])] == ["sft/seed-1", "slow/seed-1"]
    assert "is included" not in plan(fresh, "plain", "sft")


def test_arms_of_a_start_that_fails_are_not_run_and_the_others_are(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def failing(recipe, **options):
        started.append(recipe.run.name)
        if recipe.run.name == "tiny-sft-1":
            raise UsageError("no such thing")
        return run_recipe(recipe, **options)

    monkeypatch.setattr("gruppo.study.runner.run_recipe", failing)
    outcome = run(fresh)
    why = "it begins with sft/seed-1, which failed: no such thing"
    assert outcome.failed == {
        "sft/seed-1": "no such thing", "grpo/seed-1": why, "slow/seed-1": why, "grpo/seed-2": why,
    }  # fmt: skip
    assert started == ["tiny-sft-1", "tiny-plain-1"]
    assert read_states(load_study(fresh))["plain/seed-1"].complete


def test_arms_of_a_start_that_is_refused_are_not_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.study.runner.run_recipe", None)
    change(copy, "learning_rate = 3e-2", "learning_rate = 2e-2")
    forget(load_study(copy), "grpo/seed-2")
    assert "grpo/seed-2: is not trained, because sft/seed-1 is refused" in plan(copy)
    failed = run(copy).failed
    assert sorted(failed) == ["grpo/seed-2", "sft/seed-1"]
    assert failed["grpo/seed-2"].startswith("it begins with sft/seed-1, which failed: optimizer.learning_rate was")


def test_time_is_estimated_with_the_untrained_model(
    fresh: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of the start is not there yet."""
    asked = []

    def fake(recipe, **_):
        asked.append((recipe.run.name, recipe.model.name))
        return type("Check", (), {"seconds_per_step": 10.0})

    monkeypatch.setattr(check, "check_recipe", fake)
    shown = describe_plan(load_study(fresh), ["slow"], NullProgress())
    assert asked == [("tiny-sft-1", tiny_folder), ("tiny-slow-1", tiny_folder)]
    assert "about 20 s" in shown
