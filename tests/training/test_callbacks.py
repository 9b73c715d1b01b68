"""Callbacks observe a run and can end it, but do not change what it computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gruppo
from gruppo.errors import UsageError
from gruppo.runs.reading import read_lines
from gruppo.runs.results import Result
from gruppo.training.api import train
from gruppo.training.callbacks import Callbacks
from tests.small_runs import ROWS, fingerprint, recipe, small_run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    return {"evaluation__task": str(path), "evaluation__grader": "exact_match", "evaluation__every": 3}


class Recorder:
    """Records its calls; returns `answer` (or raises `error`) at the call `when`."""

    def __init__(self, when: tuple[str, int] | None = None, answer: Any = None, error: Exception | None = None) -> None:
        self.when, self.answer, self.error = when, answer, error
        self.calls: list[tuple[str, int]] = []
        self.arguments: dict[tuple[str, int], tuple[Any, ...]] = {}

    def _note(self, moment: str, step: int, *rest: Any) -> Any:
        self.calls.append((moment, step))
        self.arguments[moment, step] = rest
        if (moment, step) == self.when:
            if self.error is not None:
                raise self.error
            return self.answer
        return None

    def on_start(self, step):
        return self._note("start", step)

    def on_step(self, step, metrics, groups):
        return self._note("step", step, metrics, groups)

    def on_evaluation(self, step, figures, rows):
        return self._note("evaluation", step, figures, rows)

    def on_checkpoint(self, step, path):
        return self._note("checkpoint", step, path, sorted(file.name for file in path.iterdir()))


def run(model: str, out: Path, *callbacks: Any, resume: bool = False, **changes: Any) -> Result:
    return train(recipe(model, **changes), prompts=ROWS, out=out, resume=resume, callbacks=list(callbacks))


def test_callbacks_are_called_in_order_with_the_content_of_the_folder(
    tiny_folder: str, evaluated: dict, tmp_path: Path
) -> None:
    seen = Recorder()
    result = run(tiny_folder, tmp_path / "run", seen, run__steps=4, **evaluated)
    assert seen.calls == [
        ("start", 0), ("evaluation", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3), ("evaluation", 3),
        ("step", 4), ("evaluation", 4), ("checkpoint", 4),
    ]  # fmt: skip
    metrics, groups = seen.arguments["step", 3]
    assert metrics in read_lines(result.path / "metrics.jsonl")
    token_ids = [list(completion.token_ids) for group in groups for completion in group.completions]
    assert token_ids == [list(ids) for ids in result.rollouts(3)["token_ids"]]
    figures, rows = seen.arguments["evaluation", 4]
    assert figures["accuracy"] == result.summary["accuracy_after"]
    assert [row["answer"] for row in rows] == list(result.evaluations(4)["answer"])
    path, files = seen.arguments["checkpoint", 4]
    assert path == result.path / "checkpoints" / "step-000004"
    assert "manifest.json" in files


def test_modifying_callback_arguments_has_no_effect(
    tiny_folder: str, evaluated: dict, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    class Vandal(gruppo.Callback):
        def on_step(self, step, metrics, groups):
            metrics.clear()
            for group in groups:
                group.advantages.clear()
                group.prompt.columns.clear()

        def on_evaluation(self, step, figures, rows):
            figures["interval"].clear()
            figures["accuracy"] = 1.0
            rows.clear()

    run(tiny_folder, tmp_path / "one", Vandal(), Recorder(), **evaluated)
    assert fingerprint(tmp_path / "one") == fingerprint(trained(**evaluated))


def test_a_function_is_called_as_on_step_and_the_base_class_does_nothing(tiny_folder: str, tmp_path: Path) -> None:
    steps = []
    run(
        tiny_folder, tmp_path / "run", lambda step, metrics, groups: steps.append(step), gruppo.Callback(), run__steps=2
    )
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("when", "checkpoints"),
    [
        (("start", 0), [0]),
        (("step", 1), [1]),
        (("evaluation", 0), [0]),
        (("evaluation", 3), [2, 3]),
        (("checkpoint", 2), [2]),
        (("checkpoint", 4), [2, 4]),
    ],
)
def test_a_stopped_run_is_evaluated_saved_and_resumed(
    when: tuple[str, int], checkpoints: list[int], tiny_folder: str, evaluated: dict, tmp_path: Path,
    trained: Callable[..., Path],
) -> None:  # fmt: skip
    seen = Recorder(when, gruppo.STOP)
    result = run(tiny_folder, tmp_path / "run", seen, **evaluated)
    step = when[1]
    assert (result.summary["state"], result.summary["steps"]) == ("stopped", step)
    assert {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()} == set(checkpoints)
    assert step in result.evaluations()["step"].unique()
    assert seen.calls.count(("evaluation", step)) == 1
    assert f"Stopped by a callback: {step} steps" in _described(result)
    assert result.load_model().num_parameters() > 0
    (event,) = (line for line in read_lines(result.path / "events.jsonl") if line["kind"] == "stopped")
    assert (event["step"], event["message"]) == (step, f"Recorder.on_{when[0]} ended the run")
    again = Recorder()
    run(tiny_folder, tmp_path / "run", again, resume=True, **evaluated)
    assert again.calls[0] == ("start", step)
    assert [number for moment, number in again.calls if moment == "step"] == list(range(step + 1, 7))
    one, two = fingerprint(tmp_path / "run"), fingerprint(trained(**evaluated))
    assert one["weights"] == two["weights"]
    assert one["rollouts"] == two["rollouts"]
    assert (tmp_path / "run" / "summary.json").read_text().count('"done"')


def _described(result: Result) -> str:
    from gruppo.runs.report import describe_run

    return describe_run(result.path, result.summary, result.metrics)


def test_stop_at_the_last_step_is_the_end(tiny_folder: str, tmp_path: Path) -> None:
    seen = Recorder(("step", 2), gruppo.STOP)
    result = run(tiny_folder, tmp_path / "run", seen, run__steps=2)
    assert result.summary["state"] == "done"


@pytest.mark.parametrize("when", [("step", 3), ("step", 6), ("evaluation", 6), ("checkpoint", 2), ("checkpoint", 6)])
def test_an_exception_in_a_callback_reaches_the_caller_and_nothing_is_lost(
    when: tuple[str, int], tiny_folder: str, evaluated: dict, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    error = KeyError("mine")
    error.__cause__ = ValueError("why")
    with pytest.raises(KeyError) as caught:
        run(tiny_folder, tmp_path / "run", Recorder(when, error=error), **evaluated)
    assert caught.value is error
    assert isinstance(error.__cause__, ValueError)
    assert Result.read(tmp_path / "run").summary["state"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / f"step-{when[1]:06d}" / "manifest.json").is_file()
    small_run(tiny_folder, tmp_path / "run", resume=True, **evaluated)
    assert fingerprint(tmp_path / "run") == fingerprint(trained(**evaluated))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("when", [("step", 2), ("evaluation", 2)])
def test_a_run_that_failed_in_its_last_step_can_be_resumed_to_a_result(
    when: tuple[str, int], tiny_folder: str, evaluated: dict, tmp_path: Path
) -> None:
    changes = {"run__steps": 2, **(evaluated if when[0] == "evaluation" else {})}
    with pytest.raises(KeyError):
        run(tiny_folder, tmp_path / "run", Recorder(when, error=KeyError("x")), **changes)
    assert small_run(tiny_folder, tmp_path / "run", resume=True, **changes).load_model().num_parameters() > 0


def test_returning_true_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Recorder\.on_step returns True; return gruppo\.STOP"):
        run(tiny_folder, tmp_path / "run", Recorder(("step", 1), answer=True))
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


class OnlyWrong:
    def on_step(self, step):
        return None


@pytest.mark.parametrize(
    ("callbacks", "word"),
    [
        ([object()], "has none of on_start, on_step"),
        ([Recorder], "is a class; pass an instance"),
        ([3], "has none of"),
        (lambda step, metrics, groups: None, "pass a list"),
        ([OnlyWrong()], r"OnlyWrong\.on_step cannot be called"),
        ([lambda step: None], "cannot be called with on_step's arguments"),
    ],
)
def test_invalid_callbacks_are_reported_before_any_work(callbacks: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=word):
        Callbacks(callbacks)
    with pytest.raises(UsageError, match=word):
        train(recipe("no-such-model"), prompts=ROWS, out=tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()
