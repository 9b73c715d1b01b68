"""Runs that sample ahead: which weights sample, that no clock matters, and that they resume bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import gruppo
from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.errors import RunError, UsageError
from gruppo.models.packing import pack, score
from gruppo.rollout.ahead import Ahead
from gruppo.rollout.recorded_rows import completion_of
from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from gruppo.types import Group, Prompt
from tests.conftest import make_policy
from tests.small_runs import ROWS, at_call, fingerprint, killed, recipe, small_run

LAGGED: dict[str, Any] = {"method__tis_cap": 2.0, "cluster__lag": 2}
REFILLED = "tests/rewards/functions.py:begins_with_a_letter"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": "a"}) + "\n" for letter in "abc"))
    return {"evaluation__task": str(path), "evaluation__grader": "exact_match", "evaluation__every": 2}


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("rollouts/*")) for row in pq.read_table(path).to_pylist()]


def slowed(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Let sampling, scoring and updating take random times."""
    delays = random.Random(seed)
    for target in ("gruppo.engines.native.engine._Decoder.decode", "gruppo.training.policy_trainer.batch_loss"):
        original: Callable[..., Any] = resolve_name(target)

        def waiting(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            time.sleep(0.01 * delays.random())
            return original(*args, **kwargs)

        patch.setattr(target, waiting)


@pytest.mark.parametrize("lag", [1, 2])
def test_no_clock_matters(
    lag: int, tiny_folder: str, questions: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**LAGGED, **questions, "cluster__lag": lag}
    for seed in (1, 2):
        with monkeypatch.context() as patch:
            slowed(patch, seed)
            small_run(tiny_folder, tmp_path / f"{seed}", **changes)
    assert fingerprint(tmp_path / "1") == fingerprint(tmp_path / "2")
    for row in rows(tmp_path / "1"):
        assert row["policy_version"] == max(0, row["step"] - 1 - lag)
        assert row["staleness"] == row["step"] - 1 - row["policy_version"]
    lines = [line for line in read_lines(tmp_path / "1" / "metrics.jsonl") if "loss/total" in line]
    for line in lines:
        assert line["staleness/mean"] == line["staleness/max"] == min(lag, line["step"] - 1)
        assert ("engine/logprob_difference_mean" in line) == (line["step"] == 1), "later it would measure learning"
        assert line["time/wait"] >= 0
        assert line["time/generate"] > 0
    assert gruppo.reproduce(tmp_path / "1", 4, prompts=ROWS, progress=False).equal


def test_a_lag_of_0_is_the_run_without_a_cluster(tiny_folder: str, questions: dict, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "none", **questions)
    small_run(tiny_folder, tmp_path / "zero", cluster__lag=0, **questions)
    assert fingerprint(tmp_path / "zero") == fingerprint(tmp_path / "none")
    assert "staleness" not in rows(tmp_path / "zero")[0]
    assert not list(tmp_path.glob("*/checkpoints/*/ahead.parquet"))


def test_completions_have_the_log_probabilities_of_their_version(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And evaluations are answered by the newest weights. Lag 3 needs copies of two versions."""
    policy, kept = make_policy(), dict[int, dict[str, torch.Tensor]]()
    begin, changed = Ahead.begin, Ahead.weights_changed

    def keep(ahead: Ahead, version: int) -> None:
        kept[version] = {name: tensor.clone() for name, tensor in ahead.weights}

    monkeypatch.setattr(Ahead, "begin", lambda self, step, *rest: (keep(self, step), begin(self, step, *rest)))
    monkeypatch.setattr(
        Ahead, "weights_changed", lambda self, version, **rest: (keep(self, version), changed(self, version, **rest))
    )
    small_run(tiny_folder, tmp_path / "run", **LAGGED | {"cluster__lag": 3})
    for row in rows(tmp_path / "run"):
        differences = {}
        for version in (row["policy_version"], row["step"] - 1):
            with torch.no_grad():
                for name, tensor in policy.weights().items():
                    tensor.copy_(kept[version][name])
            policy.generation.advance()
            ids = tuple(row["prompt_token_ids"])
            completion = completion_of(row)
            group = Group(Prompt("p", "", ids, "t", {}), [completion], [])
            group.trained, group.advantages = [True], [[1.0] * len(completion.token_ids)]
            (batch,) = pack([group], sequence_mean_weights, 128, with_kl=True, device=policy.device)
            with torch.no_grad(), policy.precision():
                logprobs, _ = score(policy, batch, 1.0)
            differences[version] = float((logprobs - batch.sampling_logprobs).abs().max())
        assert differences[row["policy_version"]] < 1e-4
        if row["step"] > 2:
            assert differences[row["step"] - 1] > 1e-3, "the weights differ enough to tell"


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: str, questions: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("whole") / "run"
    small_run(tiny_folder, out, **LAGGED, **questions)
    return fingerprint(out)


MOMENTS = {
    "while sampling ahead": ("gruppo.engines.native.engine._Decoder.decode", 40),
    "while rewarding ahead": ("gruppo.rollout.workers.process.Worker._receive", 15),
    "while updating": ("gruppo.training.policy_trainer.batch_loss", 4),
    "before a step is written": ("gruppo.training.run.TrainingRun._describe", 3),
    "while evaluating": ("gruppo.evaluation.runner.grade_answers", 2),
    "while steps are saved": ("gruppo.rollout.sampled_step._rows", 3),
    "before a checkpoint is named": ("gruppo.training.checkpoint.publish", 2),
    "before the result is saved": ("gruppo.training.model_files.save_base", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(
    moment: str, tiny_folder: str, questions: dict, uninterrupted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(monkeypatch, *MOMENTS[moment]):
        small_run(tiny_folder, tmp_path / "run", **LAGGED, **questions)
    small_run(tiny_folder, tmp_path / "run", resume=True, **LAGGED, **questions)
    assert fingerprint(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("moment", ["waiting", "updating", "evaluating", "saving"])
def test_a_stopped_run_is_saved_and_continued(
    moment: str, tiny_folder: str, questions: dict, uninterrupted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, count = {
        "waiting": ("gruppo.rollout.ahead.Ahead.collect", 4),
        "updating": ("gruppo.training.policy_trainer.batch_loss", 3),
        "evaluating": ("gruppo.evaluation.runner.sample_answers", 2),
        "saving": ("gruppo.rollout.ahead.Ahead.sampled_after", 1),
    }[moment]
    with monkeypatch.context() as patch:
        at_call(patch, target, count, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            small_run(tiny_folder, tmp_path / "run", **LAGGED, **questions)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    kept = tmp_path / "run" / "checkpoints" / f"step-{summary['steps']:06d}" / "ahead.parquet"
    ahead = {row["step"] for row in pq.read_table(kept).to_pylist()}
    assert ahead == {summary["steps"] + 1, summary["steps"] + 2}
    small_run(tiny_folder, tmp_path / "run", resume=True, **LAGGED, **questions)
    assert fingerprint(tmp_path / "run") == uninterrupted


VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {"method__name": "dapo", "reward__functions": [REFILLED], "sampling__temperature": 0.7},
    "ppo": {"method__name": "ppo"},
    "minibatches": {"method__minibatches": 2, "method__inner_updates": 2},
    "lora": {"model__lora": {"rank": 2}},
    "iterations": {"run__iterations": 2, "method__kl_coef": 0.02},
    "frozen reward model": {"reward_model__prompts": 0},
    "reward model": {"reward_model__prompts": 4, "reward_model__batch_size": 8},
    "environment": {
        "environment__name": "tests/rollout/environments/worlds.py:Various", "environment__workers": 1,
        "sampling__max_tokens": 24,
    },
    "bfloat16": {"model__dtype": "bfloat16"},
    "an engine with weights of its own": {"engine__name": "tests/engines/test_probe.py:Copying"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_resumes(
    variant: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic sampling moves the cursor of the steps that are sampled ahead; an iteration replaces the reference."""
    changes = {**LAGGED, "run__steps": 4, **VARIANTS[variant]}
    settings = recipe(tiny_folder, **changes)
    if variant in ("dapo", "ppo"):
        del settings["method"]["kl_coef"]
    train(settings, prompts=ROWS, out=tmp_path / "whole", progress=False)
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 3):
        train(settings, prompts=ROWS, out=tmp_path / "run", progress=False)
    train(settings, prompts=ROWS, out=tmp_path / "run", progress=False, resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    found = rows(tmp_path / "run")
    assert all(row["policy_version"] == max(0, row["step"] - 3) for row in found)
    if variant == "dapo":
        assert max(row["group"] for row in found) > 3, "no group was ever refilled"


def test_events_of_steps_that_are_kept_are_recorded_once(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that fails now and then; its events come with the steps, also with those of the checkpoint."""
    changes = {**LAGGED, "reward__functions": ["tests/functions_of_users.py:fails_on_a"], "reward__failure_limit": 1.0}

    def events(out: Path) -> list[tuple[Any, ...]]:
        found = read_lines(out / "events.jsonl")
        return [(each["step"], each["kind"], each["message"]) for each in found if each["kind"] != "resume"]

    small_run(tiny_folder, tmp_path / "whole", **changes)
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 4):
        small_run(tiny_folder, tmp_path / "run", **changes)
    small_run(tiny_folder, tmp_path / "run", resume=True, **changes)
    assert events(tmp_path / "run") == events(tmp_path / "whole")
    assert any(kind == "reward_failed" for _, kind, _ in events(tmp_path / "run"))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_rewards_that_fail_ahead_end_the_run(tiny_folder: str, tmp_path: Path) -> None:
    """The run continues from the last checkpoint, because the weights that have to sample the step are gone."""
    changes = {**LAGGED, "reward__functions": ["tests/functions_of_users.py:always_fails"]}
    with pytest.raises(RunError, match="the last checkpoint is intact: fix the reward"):
        small_run(tiny_folder, tmp_path / "run", **changes)
    assert any(event["kind"] == "reward_failed" for event in read_lines(tmp_path / "run" / "events.jsonl"))


def test_an_extended_run_begins_to_sample_anew(tiny_folder: str, tmp_path: Path) -> None:
    """The weights that a longer run would have sampled with are gone, so the first steps are fresher."""
    constant = {**LAGGED, "optimizer__schedule": "constant", "run__steps": 4}
    small_run(tiny_folder, tmp_path / "run", **constant)
    small_run(tiny_folder, tmp_path / "run", resume=True, **constant | {"run__steps": 8})
    versions = {row["step"]: row["policy_version"] for row in rows(tmp_path / "run")}
    assert versions == {1: 0, 2: 0, 3: 0, 4: 1, 5: 4, 6: 4, 7: 4, 8: 5}
    told = [event["message"] for event in read_lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "changed"]
    assert any(message.startswith("steps 5 to 6 are sampled by the weights after step 4") for message in told)


def test_a_run_that_a_callback_ends_continues_exactly(
    tiny_folder: str, uninterrupted: dict, questions: dict, tmp_path: Path
) -> None:
    settings = recipe(tiny_folder, **LAGGED, **questions)

    def stop(step: int, *_: Any) -> Any:
        return gruppo.STOP if step == 4 else None

    train(settings, prompts=ROWS, out=tmp_path / "run", callbacks=[stop], progress=False)
    assert rows(tmp_path / "run")[-1]["step"] == 4
    train(settings, prompts=ROWS, out=tmp_path / "run", resume=True, progress=False)
    assert fingerprint(tmp_path / "run")["rollouts"] == uninterrupted["rollouts"]
    assert fingerprint(tmp_path / "run")["weights"] == uninterrupted["weights"]


def test_a_damaged_step_is_told(tiny_folder: str, tmp_path: Path) -> None:
    """A checkpoint whose file of steps was changed does not match its manifest; the one before is used."""
    small_run(tiny_folder, tmp_path / "run", **LAGGED)
    for file in (tmp_path / "run").glob("checkpoints/*/ahead.parquet"):
        file.write_bytes(file.read_bytes()[:-3])
    result = small_run(tiny_folder, tmp_path / "run", resume=True, **LAGGED)
    assert result.summary["state"] == "done"


def test_the_lag_cannot_change(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", **LAGGED, run__steps=2)
    with pytest.raises(UsageError, match=r"cluster\.lag was 2 and is 1, but it determines the weights"):
        small_run(tiny_folder, tmp_path / "run", resume=True, **LAGGED | {"cluster__lag": 1, "run__steps": 2})
