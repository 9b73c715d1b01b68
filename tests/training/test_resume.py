"""A run that is stopped at any moment and resumed equals an uninterrupted run exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gruppo.config.methods import METHODS
from gruppo.errors import UsageError
from gruppo.models.footprint import process_bytes
from gruppo.runs.reading import read_lines
from gruppo.runs.results import load_result
from gruppo.training import policy_trainer
from gruppo.training.api import train
from gruppo.training.run import TrainingRun
from tests.fuzzing import command
from tests.small_runs import ROWS, at_call, fingerprint, killed, recipe, small_run

REFILLED = "tests/rewards/functions.py:begins_with_a_letter"
EVALUATED = {"evaluation__grader": "exact_match", "evaluation__every": 2, "method__inner_updates": 2}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    return {"evaluation__task": str(path)}


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: str, questions: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("whole") / "run"
    small_run(tiny_folder, out, **EVALUATED, **questions)
    return fingerprint(out)


MOMENTS = {
    "while sampling": ("gruppo.engines.native.engine._Decoder.decode", 40),
    "while rewarding": ("gruppo.rollout.workers.process.Worker._receive", 15),
    "while updating": ("gruppo.training.policy_trainer.batch_loss", 7),
    "between inner updates": ("gruppo.training.policy_trainer.PolicyTrainer.update", 8),
    "before a step is written": ("gruppo.training.run.TrainingRun._describe", 3),
    "before a metrics line": ("gruppo.runs.folder.RunFolder.metric", 6),
    "before base is named": ("gruppo.runs.folder.publish", 1),
    "before a table is named": ("gruppo.runs.folder.publish", 5),
    "while evaluating": ("gruppo.evaluation.runner.grade_answers", 2),
    "before a checkpoint": ("gruppo.training.checkpointer.save_checkpoint", 2),
    "before a checkpoint is named": ("gruppo.training.checkpoint.publish", 2),
    "before old checkpoints go": ("gruppo.training.checkpoint.drop_old", 2),
    "before the result is saved": ("gruppo.training.model_files.save_base", 1),
    "before the first step": ("gruppo.training.run.TrainingRun.start_step", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(
    moment: str, tiny_folder: str, questions: dict, uninterrupted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(monkeypatch, *MOMENTS[moment]):
        small_run(tiny_folder, tmp_path / "run", **EVALUATED, **questions)
    small_run(tiny_folder, tmp_path / "run", resume=True, **EVALUATED, **questions)
    assert fingerprint(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bit_for_bit(
    method: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DAPO's dynamic sampling advances the cursor by its prompts; KL in the reward needs the initial reference."""

    changes = {
        "method__name": method, "reward__functions": [REFILLED], "sampling__temperature": 0.7, "run__steps": 4,
    }  # fmt: skip
    settings = {**recipe(tiny_folder, **changes)}
    del settings["method"]["kl_coef"]
    rows = ROWS
    if method == "sft":
        del settings["reward"]
        rows = [{**row, "completion": row["prompt"] + "z"} for row in ROWS]
    train(settings, prompts=rows, out=tmp_path / "whole")
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 3):
        train(settings, prompts=rows, out=tmp_path / "run")
    train(settings, prompts=rows, out=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    if method == "dapo":
        tables = fingerprint(tmp_path / "run")["rollouts"].values()
        assert max(row["group"] for table in tables for row in table) > 3, "no group was ever refilled"


LORA_MOMENTS = {
    "while updating": ("gruppo.training.policy_trainer.batch_loss", 7),
    "while the reference scores": ("gruppo.models.lora._WithoutAdapters.hidden_states", 6),
    "before a checkpoint is named": ("gruppo.training.checkpoint.publish", 2),
    "before the adapter is saved": ("gruppo.training.model_files.save_adapter", 1),
}


@pytest.fixture(scope="module")
def uninterrupted_lora(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("lora") / "run"
    small_run(tiny_folder, out, model__lora={"rank": 2}, method__inner_updates=2)
    return {**fingerprint(out), "adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes()}


@pytest.mark.parametrize("moment", LORA_MOMENTS)
def test_adapters_resume_bit_for_bit(
    moment: str, tiny_folder: str, uninterrupted_lora: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights come from the initial model, A and B from the checkpoint or, without one, from the seed."""

    out, changes = tmp_path / "run", {"model__lora": {"rank": 2}, "method__inner_updates": 2}
    with killed(monkeypatch, *LORA_MOMENTS[moment]):
        small_run(tiny_folder, out, **changes)
    small_run(tiny_folder, out, resume=True, **changes)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == uninterrupted_lora["adapter"]
    assert fingerprint(out) == {name: each for name, each in uninterrupted_lora.items() if name != "adapter"}


@pytest.mark.parametrize("moment", ["sampling", "between steps", "evaluating", "evaluating at the end", "updating"])
def test_a_stopped_run_is_saved_and_continued(
    moment: str, tiny_folder: str, questions: dict, uninterrupted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first signal arrives at different moments; an update in progress is finished first."""
    target, count = {
        "sampling": ("gruppo.engines.native.engine._Decoder.decode", 60),
        "between steps": ("gruppo.runs.folder.RunFolder.metric", 5),
        "evaluating": ("gruppo.evaluation.runner.sample_answers", 2),
        "evaluating at the end": ("gruppo.evaluation.runner.sample_answers", 4),
        "updating": ("gruppo.training.policy_trainer.batch_loss", 5),
    }[moment]
    with monkeypatch.context() as patch:
        at_call(patch, target, count, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            small_run(tiny_folder, tmp_path / "run", **EVALUATED, **questions)
    result = load_result(tmp_path / "run")
    assert result.summary["state"] == "interrupted"
    assert result.summary["steps"] < 6 or moment == "evaluating at the end"
    small_run(tiny_folder, tmp_path / "run", resume=True, **EVALUATED, **questions)
    assert fingerprint(tmp_path / "run") == uninterrupted
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert any(event["kind"] == "resume" for event in read_lines(tmp_path / "run" / "events.jsonl"))


@pytest.mark.parametrize("checkpoint_every", [1, 6])
def test_an_interruption_after_an_evaluation_keeps_it(
    checkpoint_every: int, tiny_folder: str, questions: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives in the step after it, whether or not the evaluated step has a checkpoint."""
    changes = {**EVALUATED, **questions, "run__checkpoint_every": checkpoint_every}
    small_run(tiny_folder, tmp_path / "whole", **changes)
    for out, step in (("first", 1), ("third", 3)):  # after the evaluations before step 1 and after step 2
        with monkeypatch.context() as patch:
            at_call(patch, "gruppo.rollout.live.score_groups", step, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                small_run(tiny_folder, tmp_path / out, **changes)
        assert load_result(tmp_path / out).summary["steps"] == step - 1
        small_run(tiny_folder, tmp_path / out, resume=True, **changes)
        assert fingerprint(tmp_path / out) == fingerprint(tmp_path / "whole")
        assert "damaged" not in {event["kind"] for event in read_lines(tmp_path / out / "events.jsonl")}


def test_resume_of_a_finished_run_changes_nothing(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_run(tiny_folder, tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.training.checkpointer.peak_memory", lambda _: 1)
        result = small_run(tiny_folder, tmp_path / "run", resume=True)
    peak = "peak_memory_bytes"
    assert {**result.summary, peak: 0} == {**first.summary, peak: 0}
    assert result.summary[peak] > 1, "the first process reached more memory than the second"
    assert result.summary["state"] == "done"
    assert fingerprint(tmp_path / "run") == before


def test_resume_without_a_run_starts_one(tiny_folder: str, tmp_path: Path) -> None:
    assert small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1).summary["state"] == "done"


def test_resume_keeps_the_measured_sizes(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different free memory at the resume must not change the micro-batch, and thus the rounding."""
    resident = process_bytes(torch.device("cpu"))
    monkeypatch.setattr("gruppo.engines.memory.process_bytes", lambda _: resident)
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.engines.memory.free_memory", lambda _: 10**10)
        patch.setattr("gruppo.models.packing.MAX_TOKENS", 30)
        patch.setattr(TrainingRun, "finish_step", _stop_after(2))
        small_run(tiny_folder, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "environment.json").read_text())["chosen"]
    assert before["micro_batch_tokens"] == 30
    assert (before["recompute"], before["memory_budget_bytes"]) == (False, int(0.6 * (10**10 + resident)))
    monkeypatch.setattr("gruppo.engines.memory.free_memory", lambda _: 0)
    seen = []
    original = policy_trainer.pack
    monkeypatch.setattr(
        policy_trainer, "pack", lambda *args, **kwargs: seen.append(args[2]) or original(*args, **kwargs)
    )
    small_run(tiny_folder, tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["chosen"] == before
    assert set(seen) == {30}


def test_a_run_from_before_the_memory_budget_resumes(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe has no run.memory, and nothing records whether activations are recomputed."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "finish_step", _stop_after(2))
        small_run(tiny_folder, tmp_path / "run")
    recipe, environment = tmp_path / "run" / "recipe.toml", tmp_path / "run" / "environment.json"
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("memory = ")))
    content = json.loads(environment.read_text())
    del content["chosen"]["recompute"], content["chosen"]["memory_budget_bytes"], content["memory_forecast"]
    environment.write_text(json.dumps(content))
    assert small_run(tiny_folder, tmp_path / "run", resume=True).summary["state"] == "done"
    assert not [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "changed"]


def _stop_after(steps: int):
    original = TrainingRun.finish_step

    def step(self, *arguments):
        original(self, *arguments)
        if self.state.step == steps:
            self.stop.request()

    return step


def test_changed_recipe_other_run_and_changed_weights_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", run__steps=1)
    with pytest.raises(UsageError, match="already contains a run"):
        small_run(tiny_folder, tmp_path / "run", run__steps=1)
    with pytest.raises(UsageError, match=r"run\.seed was 0 and is 1"):
        small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1, run__seed=1)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    environment["start_weights_sha256"] = "0" * 64
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(UsageError, match="not those that this run started with"):
        small_run(tiny_folder, tmp_path / "run", resume=True, run__steps=1)


def test_changed_questions_are_refused_and_changed_rewards_are_reported(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    changes = {"reward__functions": [str(tmp_path / "mine.py") + ":f"]}
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "finish_step", _stop_after(2))
        small_run(tiny_folder, tmp_path / "run", **changes)
    with pytest.raises(UsageError, match="questions are not those"):
        train(recipe(tiny_folder, **changes), prompts=ROWS[1:], out=tmp_path / "run", resume=True)
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [0.0 for c in completions]\n")
    assert small_run(tiny_folder, tmp_path / "run", resume=True, **changes).summary["state"] == "done"
    assert "changed" in [event["kind"] for event in read_lines(tmp_path / "run" / "events.jsonl")]


@pytest.mark.parametrize("before", ["of another compiler", "none"])
def test_changed_kernels_are_reported(tiny_folder: str, before: str, copied: Callable[..., Path]) -> None:
    out = copied()
    chosen = json.loads((out / "environment.json").read_text())
    now, chosen["chosen"]["kernels"] = chosen["chosen"]["kernels"], before
    (out / "environment.json").write_text(json.dumps(chosen))
    small_run(tiny_folder, out, resume=True)
    messages = [event["message"] for event in read_lines(out / "events.jsonl") if event["kind"] == "changed"]
    assert ["kernels" in message for message in messages] == [True] * (now != before)


def test_damaged_last_checkpoint_falls_back_with_an_event(
    tiny_folder: str, tmp_path: Path, copied: Callable[..., Path]
) -> None:
    copied()
    before = fingerprint(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000006" / "weights.safetensors").write_bytes(b"rubbish")
    small_run(tiny_folder, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == before
    events = read_lines(tmp_path / "run" / "events.jsonl")
    assert [event["kind"] for event in events] == ["checkpoint_unusable", "resume"]


def test_sigkill_of_the_real_command(tiny_folder: str, questions: dict, uninterrupted: dict, tmp_path: Path) -> None:
    """The command line in a separate process, killed after its third step, and resumed by the same command in this one,
    which saves seconds for importing torch."""
    import tomli_w

    data = recipe(tiny_folder, **EVALUATED, **questions)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data["task"] = {"name": str(tmp_path / "rows.jsonl")}
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(data))
    arguments = ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--resume"]
    line = [sys.executable, "-m", "gruppo.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    for shown in process.stdout:
        if shown.startswith("step    3  reward"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    code, _, errors = command(*arguments)
    assert code == 0, errors
    got = fingerprint(tmp_path / "run")
    assert got["metrics"] == uninterrupted["metrics"]
    assert got["weights"] == uninterrupted["weights"]
