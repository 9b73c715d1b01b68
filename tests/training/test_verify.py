"""`--verify`: the exported folder answers the run's own evaluation as the run did, or the export fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.errors import RunError, UsageError
from gruppo.models import pretrained
from gruppo.runs.results import Result
from gruppo.training.api import train
from gruppo.training.export import export
from gruppo.training.hub_push import push_to_hub
from gruppo.training.verify import compared
from tests.fuzzing import command
from tests.hub_server import WRITER, Hub, serving, use
from tests.small_runs import ROWS, recipe, small_run

QUESTIONS = [{"prompt": row["prompt"] * 2, "answer": "a"} for row in ROWS]


def says_something(text: str, _: Any) -> bool:
    """A grader."""
    return bool(text)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def run(tiny_folder: str, tmp_path: Path, questions: Path) -> Result:
    """A run that was evaluated before the first and after the last of its three steps, with checkpoints of 2 and 3."""
    evaluation = {"task": str(questions), "grader": "tests/training/test_verify.py:says_something"}
    changes = {f"evaluation__{name}": value for name, value in evaluation.items()}
    return small_run(tiny_folder, tmp_path / "run", run__steps=3, **changes)


def test_an_unchanged_model_gives_every_answer_again(run: Result, tmp_path: Path) -> None:
    verification = export(run.path, tmp_path / "out", max_shard_size="10KB", verify=True, progress=False).verification
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert verification is not None
    assert verification.recorded == verification.measured == run.summary["accuracy_after"] > 0.9
    assert (verification.difference, verification.changed, verification.answers) == (0, 0, 18)
    assert verification.interval[0] < 0 < verification.interval[1]
    assert verification.smallest > 0.1, "few questions show large differences only"


def test_bfloat16_is_evaluated_as_written(run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.Tensor] = []

    def load(*arguments: Any, **options: Any) -> Any:
        model = pretrained.load_weights(*arguments, **options)
        used.append(model.lm_head.weight.detach().clone())
        return model

    monkeypatch.setattr("gruppo.models.loading.load_weights", load)
    code, out, err = command("export", str(run.path), "--to", str(tmp_path / "out"), "--dtype", "bfloat16", "--verify")
    assert code == 0, err
    assert "\nverified: held-out accuracy 100.0%, the run's 100.0%: difference +0.0% (95% interval -" in out
    assert "18 questions, which can show" in out
    trained = run.load_model().lm_head.weight
    assert torch.equal(used[-1], trained.to(torch.bfloat16).float())
    assert not torch.equal(used[-1], trained)


@pytest.mark.parametrize("adapter", [False, True])
def test_adapters_are_verified_merged_and_alone(
    adapter: bool, tiny_folder: str, questions: Path, tmp_path: Path
) -> None:
    changes = {"evaluation__task": str(questions), "evaluation__grader": "exact_match"}
    small_run(tiny_folder, tmp_path / "run", run__steps=2, model__lora={"rank": 4}, **changes)
    written = export(tmp_path / "run", tmp_path / "out", adapter=adapter, verify=True, progress=False)
    assert written.verification is not None
    assert written.verification.changed == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file() == adapter


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports write a model that says nothing."""
    load_weights = pretrained.load_weights

    def load(*arguments: Any) -> Any:
        model = load_weights(*arguments)
        model.get_input_embeddings().weight.data.zero_()
        return model

    monkeypatch.setattr(pretrained, "load_weights", load)


@pytest.mark.usefixtures("mute")
def test_a_folder_that_answers_otherwise_fails(run: Result, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, out, err = command("export", str(run.path), "--to", str(folder), "--verify")
    assert code == 1
    assert out == ""
    assert err.startswith(f"gruppo: {folder}: does not answer as the run did after step 3: held-out accuracy 0.0%, ")
    assert "difference -100.0% (95% interval -100.0% to -" in err
    assert "18 of 18 answers differ. The folder is kept; do not use it." in err
    assert (folder / "config.json").is_file()


@pytest.mark.usefixtures("mute")
def test_a_folder_that_fails_is_not_pushed(run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    with serving(hub) as address:
        use(address, WRITER, str(tmp_path / "cache"), monkeypatch)
        with pytest.raises(RunError, match="does not answer as the run did"):
            push_to_hub(run.path, "me/tiny", verify=True, progress=False)
    assert hub.repositories["models", "me/tiny"].files() == {".gitattributes": b""}


def test_what_cannot_be_verified_is_refused_before_anything_is_written(
    run: Result, tiny_folder: str, tmp_path: Path
) -> None:
    small_run(tiny_folder, tmp_path / "plain", run__steps=1)
    train(recipe(tiny_folder, run__steps=1, task__held_out=0.3, evaluation__grader="exact_match"), prompts=ROWS,
          out=tmp_path / "passed", progress=False)  # fmt: skip
    for folder, options, words in (
        (tmp_path / "plain", {}, r"verify=True: the recipe in .*plain has no \[evaluation\]"),
        (tmp_path / "passed", {}, r"were passed from Python, so they cannot be asked again"),
        (run.path, {"checkpoint": 2}, r"no evaluation of its own set after step 2; export a step that .* \(0, 3\)"),
    ):
        with pytest.raises(UsageError, match=words):
            export(folder, tmp_path / "out", verify=True, progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_graders_of_a_foreign_run_need_consent(run: Result, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "foreign")
    with pytest.raises(UsageError, match=r"evaluation\.grader = .*says_something.*pass trust=True$"):
        export(tmp_path / "foreign", tmp_path / "out", verify=True, progress=False)
    code, _, err = command("export", str(tmp_path / "foreign"), "--to", str(tmp_path / "out"), "--verify")
    assert code == 2
    assert "If you trust it, write: gruppo export" in err
    assert "--verify --trust" in err
    assert export(tmp_path / "foreign", tmp_path / "out", verify=True, trust=True, progress=False).verification
    assert export(tmp_path / "foreign", tmp_path / "alone", progress=False).verification is None


def test_changed_questions_are_refused(run: Result, questions: Path, tmp_path: Path) -> None:
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS[:-1]))
    with pytest.raises(UsageError, match="the evaluation now has 17 questions, and the run asked 18"):
        export(run.path, tmp_path / "out", verify=True, progress=False)


def rows(correct: list[bool]) -> list[dict[str, Any]]:
    return [{"prompt_id": str(place), "sample": 0, "question": "q", "answer": str(value), "correct": value,
             "vote": None, "score": None} for place, value in enumerate(correct)]  # fmt: skip


@pytest.mark.parametrize(("worse", "holds"), [(0, True), (2, True), (12, False)])
def test_the_paired_interval_decides(worse: int, holds: bool) -> None:
    before, after = rows([True] * 60 + [False] * 40), rows([True] * (60 - worse) + [False] * (40 + worse))
    for one, other in ((before, after), (after, before)):
        verification = compared(one, other)
        assert verification.holds is holds, "a better score is another model too"
        assert verification.changed == worse
        assert abs(verification.difference) == pytest.approx(worse / 100)
