"""The file of a study: what it may contain, and the recipes of its arms."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from gruppo.errors import UsageError
from gruppo.study.arms import load_study, written
from gruppo.study.file import StudyFile
from tests.study.conftest import STUDY, write_study


def test_arms_differ_by_their_changes_seed_and_name(study_file: Path) -> None:
    first, second = load_study(study_file).runs[:2]
    assert first.folder == study_file.parent / "runs/low/seed-1"
    assert first.recipe.run.name == "tiny-low-1"
    values = [run.recipe.as_mapping() for run in (first, second)]
    assert values[0].pop("optimizer")["learning_rate"] == 3e-3
    assert values[1].pop("optimizer")["learning_rate"] == 3e-2
    assert values[0]["run"].pop("name") != values[1]["run"].pop("name")
    assert values[0] == values[1]


def test_a_recipe_is_a_file_or_a_packaged_name(study_file: Path) -> None:
    (study_file.parent / "mine.toml").write_text('extends = "quickstart"\n[run]\nsteps = 77\n')
    text = study_file.read_text().replace("tokens = 150", "tokens = 5").split("[recipe]")[0]
    for name, steps in (("mine.toml", 77), ("quickstart", 12)):
        study_file.write_text(text + f'[[arms]]\nname = "a"\nrecipe = "{name}"\nchanges.method.clip_high = 0.3\n')
        (run, _) = load_study(study_file).runs
        assert run.recipe.run.steps == steps
        assert run.recipe.method.clip_high == 0.3
        assert written(run.arm.changes) == ["method.clip_high = 0.3"]
    study_file.write_text(
        text.replace("{ tokens = 5 }", "{ steps = 3 }") + '[[arms]]\nname = "a"\nrecipe = "quickstart"'
    )
    assert load_study(study_file).runs[0].recipe.run.steps == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [1, 2]", "seeds = [1, 1]", ["seeds = 1", "twice"]),
        ("{{ tokens = {tokens} }}", "{{ tokens = 5, steps = 1 }}", ["study.budget", "exactly one"]),
        ("{{ tokens = {tokens} }}", "{{ tokens = 9999 }}", ["arm low: run.steps = 9", "at most 576 ", "steps = 157"]),
        ('["low", "high"]', '["low", "hihg"]', ["questions: rates", '"hihg" is no arm', 'did you mean "high"']),
        ("letters/pass@2", "letters/pass@4", ["samples = 2", "write samples = 4"]),
        ("letters/pass@2", "letters/best", ["EVALUATION/accuracy"]),
        ("letters/pass@2", "leters/pass@2", ['"leters" is no evaluation', 'did you mean "letters"']),
        ('evaluation = "letters"', "", ["figures: samples", "is no evaluation"]),
        ('name = "high"', 'name = "initial"', ["reserved"]),
        ('name = "high"', 'name = "low"', ["arms: name = 'low'", "twice"]),
        ("questions = 4", "questions = 4\nevery = 2", ["every = 2", "[[benchmarks]] in the recipe"]),
        ("chosen_on", "choosen_on", ["arms.1.choosen_on", 'did you mean "chosen_on"']),
        ("max_tokens = 8", "max_tokns = 8", ["arm low", "sampling.max_tokns", 'did you mean "max_tokens"']),
        ('"optimizer.learning_rate" =', '"optimizer learning_rate" =', ["arm high", "is no field"]),
        ("[recipe]", 'recipe = "none.toml"\n[other]', ["other: unknown field"]),
        ("title", "[title", ["cannot be read as TOML"]),
        ('name = "low"', 'name = "records"', ["reserved"]),
        ("questions = 4", 'questions = 4\nrecall_control = "gsm8k"', ["recall_control", "without recall = true"]),
        ('label =', 'start = "hihg"\nlabel =', ['arms: low: start = "hihg": is no arm; did you mean "high"?']),
        ('label =', 'start = "low"\nlabel =', ['arms: low: start = "low": low begins with low, so', "remove start"]),
        ("[[evaluations]]", 'start = "high"\n[[evaluations]]', ['arms: high: start = "high": high begins with high']),
        ('label =', 'start = "high"\nbudget = {{ steps = 0 }}\nlabel =', ["arms.0.budget.steps = 0"]),
        ('label =', 'start = "high"\nchanges.model.name = "x"\nlabel =', [
            'arm low: model.name = "x": the arm begins with the model of start = "high"; remove one of the two',
        ]),
        ('label =', 'start = "high"\nrecipe.model.name = "x"\nlabel =', ['arm low: model.name = "x"', "remove one"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in STUDY
    file = write_study(tmp_path, "tiny", text=STUDY.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_study(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples = 2", "samples = 0", "evaluations.0.samples = 0: {at_least} 1; write e.g. samples = 1"),
        ("samples = 2", "samples = 2.5", "evaluations.0.samples = 2.5: must be a valid integer; write e.g. samples ="),
        ("{{ tokens = {tokens} }}", "{{ tokens = 0 }}", "study.budget.tokens = 0: {at_least} 1; Sampled tokens. A run"),
        ("seeds = [1, 2]", "seeds = [-1]", "study.seeds.0 = -1: {at_least} 0; Values of run.seed."),
        ("seeds = [1, 2]", "seeds = 3", "study.seeds = 3: must be a valid list; write e.g. seeds = [3]"),
        ('name = "low"', 'name = "low"\nseeds = [-2]', "arms.0.seeds.0 = -2: {at_least} 0; In place of"),
        ("temperature = 1.0", "temperature = -1.0", "evaluations.0.decoding.temperature = -1.0: {at_least} 0; write"),
        ("questions = 4", "recall = 1", "evaluations.0.recall = 1: must be a valid boolean; write e.g. recall = true"),
    ],
)
def test_values_of_the_wrong_range_or_type_come_with_advice(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    file = write_study(tmp_path, "tiny", text=STUDY.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_study(file)
    assert f"{file}: {message.format(at_least='must be greater than or equal to')}" in str(caught.value)


def test_the_example_loads() -> None:
    assert len(load_study(Path("examples/study.toml")).runs) == 4


def test_every_field_is_explained() -> None:
    definitions = StudyFile.model_json_schema()["$defs"]
    for name in ("Head", "Budget", "Arm", "EvaluationSet", "Question", "FigureTable"):
        for field, schema in definitions[name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"


def test_arms_that_begin_with_each_other_are_refused(tmp_path: Path) -> None:
    text = STUDY.replace("label =", 'start = "high"\nlabel =').replace(
        "[[evaluations]]", 'start = "low"\n[[evaluations]]'
    )
    with pytest.raises(UsageError, match=r'arms: low: start = "high": low begins with high begins with low, so none'):
        load_study(write_study(tmp_path, "tiny", text=text))


def test_dropped_groups_count_towards_a_budget_of_tokens(tiny_folder: str, tmp_path: Path) -> None:
    """A step of dynamic sampling can sample 1 + rounds times."""
    text = STUDY.replace("method.kl_coef = 0.0", "method = {{ kl_coef = 0.0, dynamic_sampling_rounds = {rounds} }}")
    for rounds, possible in ((17, True), (16, False)):
        file = write_study(tmp_path / str(rounds), tiny_folder, 10_000, text.replace("{rounds}", str(rounds)))
        with nullcontext() if possible else pytest.raises(UsageError, match="samples at most 9,792 tokens"):
            load_study(file)
