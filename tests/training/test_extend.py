"""A run that is extended equals one that had its length from the start; other changes at a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.models.weights import save_model
from gruppo.runs.reading import read_lines
from gruppo.runs.status import read_status
from gruppo.training.api import train
from gruppo.training.reproduce import reproduce
from tests.conftest import make_policy
from tests.small_runs import ROWS, at_call, fingerprint, killed, recipe, small_run

Trained = Callable[..., Path]  # the fixtures of conftest.py
CONSTANT = {"optimizer__schedule": "constant"}
ITERATED = {
    **CONSTANT, "reward__weights": [0.0], "reward_model__prompts": 4, "reward_model__batch_size": 8,
    "reward_model__learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    return {"evaluation__task": str(path), "evaluation__grader": "exact_match"}


def compared(out: Path, without: tuple[int, ...] = ()) -> dict[str, Any]:
    """The fingerprint of a run without its evaluations after some steps."""
    found = fingerprint(out)
    found["metrics"] = [line for line in found["metrics"] if line["step"] not in without or "completion/length" in line]
    names = [f"step-{step:06d}.parquet" for step in without]
    found["evaluations"] = {name: rows for name, rows in found["evaluations"].items() if name not in names}
    return found


def events(out: Path, kind: str = "changed") -> list[dict[str, Any]]:
    return [event for event in read_lines(out / "events.jsonl") if event["kind"] == kind]


@pytest.mark.parametrize("lengths", [(2, 6), (3, 6), (1, 2, 5, 6)])
def test_an_extended_run_equals_one_of_that_length(
    lengths: tuple[int, ...], tiny_folder: str, questions: dict, tmp_path: Path, trained: Trained
) -> None:
    """The evaluations after the old last steps are additional; nothing else differs."""
    out, changes = tmp_path / "run", {**CONSTANT, **questions, "method__inner_updates": 2}
    whole = trained(**changes)
    for length in lengths:
        result = small_run(tiny_folder, out, resume=True, **changes, run__steps=length)
        assert (result.summary["state"], result.summary["steps"]) == ("done", length)
    assert compared(out, lengths[:-1]) == compared(whole, lengths[:-1])
    for name in ("model/model.safetensors", "recipe.toml"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [(event["step"], event["old"], event["new"]) for event in events(out)] == [
        (old, old, new) for old, new in pairwise(lengths)
    ]
    status = read_status(out)
    assert status is not None
    assert (status.step, status.steps, status.state) == (6, 6, "done")
    forecasts = [json.loads((path / "environment.json").read_text())["disk_forecast"] for path in (out, whole)]
    assert forecasts[0] == forecasts[1]


MOMENTS = {
    "before the change is stored": ("gruppo.runs.folder.RunFolder.start", 2),
    "while the change is stored": ("gruppo.runs.folder.RunFolder.write_json", 4),
    "before its event": ("gruppo.runs.folder.RunFolder.event", 1),
    "in the first step after it": ("gruppo.training.run.TrainingRun._describe", 4),
    "at the end": ("gruppo.training.model_files.save_base", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_extension_that_is_killed_loses_nothing(
    moment: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    out, whole = tmp_path / "run", trained(**CONSTANT)
    target, count = MOMENTS[moment]
    with killed(monkeypatch, target, count):
        small_run(tiny_folder, out, **CONSTANT, run__steps=3)
        small_run(tiny_folder, out, resume=True, **CONSTANT)
    small_run(tiny_folder, out, resume=True, **CONSTANT)
    assert fingerprint(out) == fingerprint(whole)
    assert (out / "recipe.toml").read_bytes() == (whole / "recipe.toml").read_bytes()
    assert [(event["field"], event["old"], event["new"]) for event in events(out)] == [("run.steps", 3, 6)]
    assert "recipe" not in json.loads((out / "environment.json").read_text())


def test_an_interrupted_run_is_extended_and_shortened(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    out, whole, short = tmp_path / "run", trained(**CONSTANT), trained(**CONSTANT, run__steps=4)
    with monkeypatch.context() as patch:
        at_call(patch, "gruppo.training.run.TrainingRun._describe", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            small_run(tiny_folder, out, **CONSTANT, run__steps=20)
    with pytest.raises(UsageError, match=r"run\.steps was 20 and is 2: 3 steps are done; write run\.steps = 3 or more"):
        small_run(tiny_folder, out, resume=True, **CONSTANT, run__steps=2)
    small_run(tiny_folder, out, resume=True, **CONSTANT, run__steps=4)
    assert fingerprint(out)["weights"] == fingerprint(short)["weights"]
    small_run(tiny_folder, out, resume=True, **CONSTANT)
    assert fingerprint(out)["metrics"] == fingerprint(whole)["metrics"]
    assert fingerprint(out)["weights"] == fingerprint(whole)["weights"]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decaying_schedule_is_not_extended(schedule: str, tiny_folder: str, tmp_path: Path) -> None:
    out, changes = tmp_path / "run", {"optimizer__schedule": schedule, "run__steps": 3}
    small_run(tiny_folder, out, **changes)
    before = fingerprint(out)
    with pytest.raises(
        UsageError, match=rf'run\.steps was 3 and is 6: with optimizer\.schedule = "{schedule}" .*constant'
    ) as error:
        small_run(tiny_folder, out, resume=True, **{**changes, "run__steps": 6})
    assert f'model.name = "{out / "model"}"' in str(error.value)
    assert fingerprint(out) == before
    assert small_run(tiny_folder, out, resume=True, **changes).summary["state"] == "done"


def test_a_decaying_schedule_is_extended_during_its_warm_up(tiny_folder: str, tmp_path: Path) -> None:
    changes = {"optimizer__warmup_steps": 3}
    small_run(tiny_folder, tmp_path / "whole", **changes)
    small_run(tiny_folder, tmp_path / "run", **changes, run__steps=3)
    small_run(tiny_folder, tmp_path / "run", resume=True, **changes)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_warm_up_that_depends_on_the_length(tiny_folder: str, tmp_path: Path) -> None:
    def run(out: str, resume: bool = False, **changes: Any) -> None:
        data = recipe(tiny_folder, **{**CONSTANT, **changes})
        if "optimizer__warmup_ratio" in changes:
            del data["optimizer"]["warmup_steps"]
        train(data, prompts=ROWS, out=tmp_path / out, resume=resume, progress=False)

    run("run", run__steps=4, optimizer__warmup_ratio=0.5)
    with pytest.raises(
        UsageError, match=r"warm-up would take 3 steps.* a warm-up of 2; write optimizer.warmup_steps = 2"
    ):
        run("run", resume=True, optimizer__warmup_ratio=0.5)
    run("run", resume=True, optimizer__warmup_steps=2)
    run("whole", optimizer__warmup_steps=2)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_run_of_epochs(tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """18 prompts, 4 per step: an epoch has 5 steps. The recipe of the run has steps, so both can extend it."""

    def run(out: str, **length: Any) -> None:
        data = recipe(tiny_folder, optimizer__schedule="constant")
        data["run"] = {"name": "tiny", "checkpoint_every": 2, **length}
        train(data, prompts=ROWS, out=tmp_path / out, resume=True)

    run("run", epochs=0.5)
    assert "run.epochs = 0.5: 3 steps of 4 prompts (18 in all)" in capsys.readouterr().err
    assert "steps = 3\n" in (tmp_path / "run" / "recipe.toml").read_text()
    assert "epochs" not in (tmp_path / "run" / "recipe.toml").read_text()
    run("run", epochs=0.5)
    assert events(tmp_path / "run") == []
    run("run", epochs=1)
    run("whole", steps=5)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"run\.steps was 5 and is 3: 5 steps are done"):
        run("run", epochs=0.5)
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.steps == 5


def test_epochs_that_do_not_fit_are_refused_before_the_model_is_loaded(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.training.setup.load_model", None)
    data = recipe(tiny_folder, optimizer__warmup_steps=9)
    data["run"] = {"epochs": 1}
    with pytest.raises(
        UsageError, match=r"run\.epochs = 1, with 18 prompts: optimizer\.warmup_steps = 9: must be at most"
    ):
        train(data, prompts=ROWS, out=tmp_path / "run", progress=False)


def test_iterations_keep_their_length(tiny_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small_run(tiny_folder, tmp_path / "whole", **ITERATED, run__iterations=3)
    small_run(tiny_folder, out, **ITERATED, run__iterations=2, run__steps=4)
    with pytest.raises(UsageError, match=r"of 2 steps each.* write run\.steps = 6 and run\.iterations = 3"):
        small_run(tiny_folder, out, resume=True, **ITERATED, run__iterations=2)
    small_run(tiny_folder, out, resume=True, **ITERATED, run__iterations=3)
    assert fingerprint(out) == fingerprint(tmp_path / "whole")
    labels = [path.read_bytes() for path in sorted(out.glob("labels/*"))]
    assert labels == [path.read_bytes() for path in sorted(tmp_path.glob("whole/labels/*"))]


def test_the_best_checkpoint_is_chosen_among_all_evaluations(tiny_folder: str, questions: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for length in (1, 3, 5):
        small_run(tiny_folder, out, resume=True, **CONSTANT, **questions, run__steps=length, run__checkpoint_every=1)
    state = json.loads((out / "checkpoints" / "step-000005" / "state.json").read_text())
    best = max((1, 3, 5), key=lambda step: (state["evaluations"][str(step)]["accuracy"], step))
    assert {path.name for path in (out / "checkpoints").iterdir()} == {f"step-{step:06d}" for step in (4, 5, best)}


FREE: dict[str, dict[str, Any]] = {
    "timeout": {"reward__timeout": 20.0},
    "workers": {"reward__workers": 2},
    "memory of rewards": {"reward__memory": "2 GB"},
    "environment variables": {"reward__environment": ["LANG"]},
    "failure limit": {"reward__failure_limit": 0.5},
    "checkpoints": {"run__checkpoint_every": 3},
    "name": {"run__name": "another"},
    "an audit": {"audit__function": "tests/rewards/functions.py:ends_in_a_vowel"},
    "several": {"reward__timeout": 20.0, "reward__failure_limit": 1.0},
}


def test_a_model_that_was_moved(tiny_folder: str, tmp_path: Path, copied: Trained) -> None:
    """Its weights are compared, whatever it is called."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    copied(run__steps=1)
    small_run(str(moved), tmp_path / "run", resume=True, run__steps=1)
    (event,) = events(tmp_path / "run")
    assert (event["field"], event["new"]) == ("model.name", str(moved))
    save_model(make_policy(seed=1), tmp_path / "other")
    with pytest.raises(UsageError, match="the weights of the initial model are not those"):
        small_run(str(tmp_path / "other"), tmp_path / "run", resume=True, run__steps=1)


def test_another_spelling_is_no_change(tiny_folder: str, tmp_path: Path, copied: Trained) -> None:
    copied(run__steps=1)
    spelled = {"reward__functions": [str(Path("tests/rewards/functions.py:likes_letters").absolute())],
               "reward__weights": [1.0]}  # fmt: skip
    small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1, **spelled)
    assert events(tmp_path / "run") == []


@pytest.mark.parametrize("name", FREE)
def test_fields_that_do_not_change_what_is_computed(
    name: str, tiny_folder: str, trained: Trained, copied: Trained
) -> None:
    whole, out = trained(**CONSTANT, run__steps=4), copied(**CONSTANT, run__steps=2)
    for _ in range(2):  # the second time, nothing has changed
        small_run(tiny_folder, out, resume=True, run__steps=4, **CONSTANT, **FREE[name])
    got, expected = fingerprint(out), fingerprint(whole)
    got["metrics"] = [{k: v for k, v in line.items() if not k.startswith("audit/")} for line in got["metrics"]]
    assert got == expected
    fields = {event["field"].partition(".")[0] for event in events(out)}
    assert fields == {"run", *(key.partition("__")[0] for key in FREE[name])}
    assert len(events(out)) == 1 + len(FREE[name])
    assert {event["step"] for event in events(out)} == {2}


def test_evaluation_changes_and_is_not_compared_across_the_change(
    tiny_folder: str, questions: dict, tmp_path: Path, trained: Trained
) -> None:
    out, every, whole = tmp_path / "run", {"evaluation__every": 1}, trained(**CONSTANT, run__steps=4)
    small_run(tiny_folder, out, run__steps=2, **CONSTANT, **questions)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "d", "answer": "a"}\n')
    changes = {**CONSTANT, **questions, **every, "evaluation__task": str(other)}
    result = small_run(tiny_folder, out, resume=True, run__steps=4, **changes)
    assert result.summary["weights_sha256"] == fingerprint(whole)["weights"]
    assert (result.summary["accuracy_before"], result.summary["questions"]) == (None, 1)
    assert result.summary["accuracy_after"] is not None
    state = json.loads((out / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["evaluations_from"] == 3
    assert {"evaluation.every", "evaluation.task.name", "run.steps"} == {event["field"] for event in events(out)}
    small_run(tiny_folder, out, resume=True, run__steps=4, **CONSTANT)  # and without any evaluation
    assert events(out)[-1]["field"] == "evaluation"
    assert events(out)[-1]["new"] is None


def test_other_prompts_are_refused_even_if_the_evaluation_changes(
    tiny_folder: str, questions: dict, tmp_path: Path, copied: Trained
) -> None:
    copied(run__steps=1)
    with pytest.raises(UsageError, match="training prompts are not those"):
        train(recipe(tiny_folder, run__steps=1, **questions), prompts=ROWS[1:], out=tmp_path / "run", resume=True)


def test_old_folders_have_one_hash_of_prompts_and_questions(
    tiny_folder: str, questions: dict, tmp_path: Path, copied: Trained
) -> None:
    copied(run__steps=1)
    file = tmp_path / "run" / "environment.json"
    environment = json.loads(file.read_text())
    del environment["prompts_sha256"]
    file.write_text(json.dumps(environment))
    with pytest.raises(UsageError, match="recorded no hash of its prompts alone, so its evaluation cannot change"):
        small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1, **questions)
    assert small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1).summary["state"] == "done"


def test_memory_ends_the_promise_and_says_so(tiny_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small_run(tiny_folder, out, run__steps=2, **CONSTANT, run__memory="4 GB")
    before = json.loads((out / "environment.json").read_text())["chosen"]
    small_run(tiny_folder, out, resume=True, run__steps=3, **CONSTANT, run__memory="3 GB")
    after = json.loads((out / "environment.json").read_text())["chosen"]
    assert (before["memory_budget_bytes"], after["memory_budget_bytes"]) == (4 * 10**9, 3 * 10**9)
    assert {name: before[name] for name in ("device", "dtype", "threads", "kernels")} == {
        name: after[name] for name in ("device", "dtype", "threads", "kernels")
    }
    message = next(event["message"] for event in events(out) if event["field"] == "run.memory")
    assert "run.memory was '4 GB' and is '3 GB': sizes were chosen anew" in message
    assert "may not equal those of an unchanged run bit for bit" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__seed": 1}, r"run\.seed was 0 and is 1, but every sampled token depends on it; restore it"),
        ({"sampling__group_size": 2}, r"sampling\.group_size was 4 and is 2, but the completions so far"),
        ({"method__kl_coef": 0.1, "optimizer__beta1": 0.8}, r"method\.kl_coef was .*optimizer\.beta1 .*; restore them"),
        ({"sampling__stop": ["x"]}, r"sampling\.stop was \[\] and is \['x'\]"),
        ({"reward__weights": [2.0]}, r"reward\.weights was \[1\.0\] and is \[2\.0\], but the steps"),
    ],
)  # fmt: skip
def test_what_cannot_change_is_refused(
    changes: dict, message: str, tiny_folder: str, tmp_path: Path, copied: Trained
) -> None:
    copied(run__steps=1)
    with pytest.raises(UsageError, match=message) as error:
        small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1, **changes)
    assert f'start a new run from its result (model.name = "{tmp_path / "run" / "model"}")' in str(error.value)


def test_a_reward_is_fixed_after_a_failure(tiny_folder: str, tmp_path: Path) -> None:
    """gruppo's own advice: fix the reward and continue with resume=True."""
    file, out = tmp_path / "mine.py", tmp_path / "run"
    scores = "return [float(len(text)) for text in completions]\n"
    file.write_text(f"def f(completions, trainer_state, **_):\n    assert trainer_state.global_step < 2\n    {scores}")
    changes = {**CONSTANT, "reward__functions": [f"{file}:f"]}
    with pytest.raises(Exception, match="fix the reward and continue with resume=True") as error:
        small_run(tiny_folder, out, **changes)
    assert "step 3" in str(error.value)
    file.write_text(f"def f(completions, **_):\n    {scores}")
    for _ in range(2):
        assert small_run(tiny_folder, out, resume=True, **changes).summary["state"] == "done"
    (event,) = events(out)
    assert (event["step"], event["field"]) == (2, "reward.functions")
    assert event["old"] != event["new"]
    assert event["message"].startswith("the code of f has changed; from here on, results differ")
    assert json.loads((out / "environment.json").read_text())["rewards_sha256"] == [event["new"]]
    (note,) = [note for note in reproduce(out, 1, prompts=ROWS, progress=False).notes if "code" in note]
    assert note.startswith("after step 2, the code of f has changed")
