"""Outer iterations of Algorithm 1: the reference becomes the policy, and the reward model is trained, with replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from gruppo.config.loading import RecipeError, load_recipe, without_unused_fields
from gruppo.errors import RunError, UsageError
from gruppo.models.reward_model import save_reward_model
from gruppo.models.value_head import ScalarModel
from gruppo.runs.reading import read_lines
from gruppo.runs.results import Result
from gruppo.runs.warnings import warnings_of
from gruppo.training.api import train
from gruppo.training.callbacks import STOP, Callback
from gruppo.utils.signals import Interrupted
from tests.conftest import make_policy
from tests.small_runs import ROWS, at_call, fingerprint, killed, recipe

VOWELS = "tests/rewards/functions.py:ends_in_a_vowel"
EVERY_TWO = "tests/functions_of_users.py:every_two"


def rounds(model: str, kind: str, **changes: Any) -> dict[str, Any]:
    """Three iterations of two steps, rewarded by a reward model alone; the rule only labels."""
    settings = recipe(
        model, run__iterations=3, reward__functions=[VOWELS], reward__weights=[0.0], reward_model__kind=kind,
        reward_model__prompts=10, reward_model__epochs=2, reward_model__batch_size=8,
        reward_model__learning_rate=1e-3, reward_model__replay_fraction=0.2,
    )  # fmt: skip
    if kind == "process":
        settings["method"]["name"] = "grpo-process"
        settings["reward_model"] |= {"split": EVERY_TWO, "continuations": 2}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        settings[section][field] = value
    return without_unused_fields(settings)


def labels_of(out: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "labels").iterdir())}


@pytest.fixture(scope="module", params=["outcome", "process"])
def finished(request: pytest.FixtureRequest, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    out = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, out, train(rounds(tiny_folder, request.param), prompts=ROWS, out=out)


def test_the_reference_becomes_the_policy_at_the_start_of_each_iteration(finished: tuple[str, Path, Result]) -> None:
    steps = [line for line in finished[2].metrics if "policy/kl" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert first["policy/kl"] == pytest.approx(0, abs=1e-9)
        assert second["policy/kl"] > 1e-7


def test_one_iteration_keeps_the_start_model_as_reference(tiny_folder: str, tmp_path: Path) -> None:
    result = train(recipe(tiny_folder), prompts=ROWS, out=tmp_path / "run")
    assert all(line["policy/kl"] > 1e-7 for line in result.metrics[1:])
    assert not any("iteration" in line for line in result.metrics)


def test_the_reward_model_is_trained_on_new_samples_and_a_share_of_old_ones(finished: tuple[str, Path, Result]) -> None:
    _, out, result = finished
    begun = [line for line in result.metrics if "iteration" in line]
    assert [(line["iteration"], line["step"]) for line in begun] == [(1, 0), (2, 2), (3, 4)]
    assert not any("policy/kl" in line for line in begun)
    tables = labels_of(out)
    assert list(tables) == ["step-000000.parquet", "step-000002.parquet", "step-000004.parquet"]
    assert all(len(rows) == 40 for rows in tables.values())
    for line in begun:
        assert line["reward_model/new"] + line["reward_model/held_out"] == 40
        assert line["reward_model/before/labels"] == line["reward_model/after/labels"] > 0
        assert 0 <= line["reward_model/after/accuracy"] <= 1
        assert "reward_model/after/calibration_error" in line
        assert 0 <= line["reward_model/after/positives"] <= line["reward_model/after/labels"]
        assert "reward_model/after/majority_vote" in line
    assert begun[0]["reward_model/replayed"] == 0
    for line in begun[1:]:
        share = line["reward_model/replayed"] / (line["reward_model/replayed"] + line["reward_model/new"])
        assert share == pytest.approx(0.2, abs=0.02)
    drawn = [row["prompt_id"] for row in tables["step-000000.parquet"]]
    assert len(set(drawn)) == 10


def test_a_reward_model_no_better_than_chance_triggers_a_warning(finished: tuple[str, Path, Result]) -> None:
    _, out, result = finished
    events = [each for each in read_lines(out / "events.jsonl") if each.get("warning") == "reward_model_guesses"]
    seen = [each for each in warnings_of(result.metrics, {}, 1.0) if each.name == "reward_model_guesses"]
    assert [(each["step"], each["message"]) for each in events] == [(each.step, each.message) for each in seen]
    assert events[0]["step"] == 0, "the first round of a tiny model without knowledge"


def test_the_score_of_the_reward_model_is_the_reward(finished: tuple[str, Path, Result]) -> None:
    kind, out, _ = finished
    rows = pq.read_table(out / "rollouts/step-000002.parquet").to_pylist()
    judged = [row for row in rows if '"reward_model"' in (row["steps"] if kind == "process" else row["reward_parts"])]
    assert len(judged) >= len(rows) - 2, "but for completions without a step"
    if kind == "outcome":
        assert all(0 < row["reward"] < 1 for row in rows)
    else:
        assert all(row["reward"] == 0 for row in rows)
    assert any(any(row["advantages"]) for row in rows)


def test_transformers_loads_the_reward_model(finished: tuple[str, Path, Result]) -> None:
    kind, out, _ = finished
    auto = AutoModelForSequenceClassification if kind == "outcome" else AutoModelForTokenClassification
    _, report = auto.from_pretrained(out / "reward_model", output_loading_info=True)
    assert not report["missing_keys"]
    saved = load_file(out / "reward_model" / "model.safetensors")
    (checkpoint,) = (each for each in (out / "checkpoints").iterdir() if each.name == "step-000006")
    weights = load_file(checkpoint / "reward_model.weights.safetensors")
    assert (saved["score.weight"] == weights["score.weight"]).all()
    assert (weights["score.weight"] != 0).any()


MOMENTS = {
    "while the first is trained": ("gruppo.training.reward_model.update", 3),
    "while labels are sampled": ("gruppo.rollout.step_labels.StepLabeller.label", 2),
    "while it is trained again": ("gruppo.training.reward_model.update", 12),
    "before labels are named": ("gruppo.runs.atomic.publish", 12),
    "between the reference and its checkpoint": ("gruppo.training.reward_model.RewardModelTrainer.learn", 2),
    "before the checkpoint of the iteration": ("gruppo.training.checkpointer.save_checkpoint", 3),
    "within an iteration": ("gruppo.training.policy_trainer.batch_loss", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(
    moment: str, finished: tuple[str, Path, Result], tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, whole, _ = finished

    with killed(monkeypatch, *MOMENTS[moment]):
        train(rounds(tiny_folder, kind), prompts=ROWS, out=tmp_path / "run")
    train(rounds(tiny_folder, kind), prompts=ROWS, out=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(whole)
    assert labels_of(tmp_path / "run") == labels_of(whole)
    saved = "reward_model/model.safetensors"
    assert (tmp_path / "run" / saved).read_bytes() == (whole / saved).read_bytes()


@pytest.mark.parametrize(("count", "steps"), [(3, 0), (12, 2)])
def test_an_interruption_during_reward_model_training_leaves_the_previous_checkpoint(
    count: int,
    steps: int,
    finished: tuple[str, Path, Result],
    tiny_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first step there is no checkpoint, and a partly trained model must not be saved."""
    kind, whole, _ = finished

    def stops() -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        at_call(patch, "gruppo.training.reward_model.update", count, stops)
        stopped = train(rounds(tiny_folder, kind), prompts=ROWS, out=tmp_path / "run")
    assert (stopped.summary["state"], stopped.summary["steps"]) == ("interrupted", steps)
    train(rounds(tiny_folder, kind), prompts=ROWS, out=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


@pytest.mark.parametrize(("count", "steps"), [(1, 0), (2, 2), (3, 2)])
def test_a_callback_that_stops_the_run_at_an_iteration_checkpoint_leaves_a_result(
    count: int, steps: int, tiny_folder: str, tmp_path: Path
) -> None:
    """The checkpoint after the first training, the one before the second, and the one after it."""
    seen = []

    class Stops(Callback):
        def on_checkpoint(self, step: int, path: Path) -> object:
            seen.append(step)
            return STOP if len(seen) == count else None

    result = train(rounds(tiny_folder, "outcome"), prompts=ROWS, out=tmp_path / "run", callbacks=[Stops()])
    assert (result.summary["state"], result.summary["steps"]) == ("stopped", steps)
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert (tmp_path / "run/reward_model/model.safetensors").is_file()
    tables = sorted(table.name for table in (tmp_path / "run/labels").iterdir())
    assert len(tables) == (2 if count == 3 else 1), "stopped before the second training, it is not begun"


def test_rules_that_fail_while_labelling_are_reported_and_end_the_run(tiny_folder: str, tmp_path: Path) -> None:
    settings = rounds(tiny_folder, "outcome", reward__functions=["tests/rewards/functions.py:never"])
    with pytest.raises(RunError, match="has a label and is left to train on"):
        train(settings, prompts=ROWS, out=tmp_path / "run")
    events = read_lines(tmp_path / "run/events.jsonl")
    assert [(each["kind"], each["completions"]) for each in events] == [("reward_failed", 40)]


def test_labels_that_were_modified_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    class Stops(Callback):
        def on_step(self, step: int, metrics: object, groups: object) -> object:
            return STOP

    train(rounds(tiny_folder, "outcome"), prompts=ROWS, out=tmp_path / "run", callbacks=[Stops()])
    (tmp_path / "run/labels/step-000000.parquet").unlink()
    with pytest.raises(RunError, match=r"step-000000\.parquet: is not what this run wrote"):
        train(rounds(tiny_folder, "outcome"), prompts=ROWS, out=tmp_path / "run", resume=True)


def test_a_resume_with_other_reward_model_weights_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    model = ScalarModel.on(make_policy(initializer_range=0.02), bias=False)
    save_reward_model(model, "outcome", tmp_path / "judge")
    settings = rounds(tiny_folder, "outcome", reward_model__name=str(tmp_path / "judge"), reward_model__prompts=0)
    train(settings, prompts=ROWS, out=tmp_path / "run")
    torch.nn.init.ones_(model.head.weight)
    save_reward_model(model, "outcome", tmp_path / "judge")
    with pytest.raises(UsageError, match="weights of the reward model"):
        train(settings, prompts=ROWS, out=tmp_path / "run", resume=True)


def test_a_trained_reward_model_scores_without_training(
    finished: tuple[str, Path, Result], tiny_folder: str, tmp_path: Path
) -> None:
    kind, out, _ = finished
    settings = rounds(
        tiny_folder, kind, reward_model__name=str(out / "reward_model"), reward_model__prompts=0, run__iterations=1
    )
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    assert not any(name.startswith("reward_model/") for line in result.metrics for name in line)
    part = "reward/reward_model/mean" if kind == "outcome" else "reward/reward_model/step_mean"
    assert all(0 < line[part] < 1 for line in result.metrics)
    assert not (tmp_path / "run" / "labels").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*/reward_model*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__iterations": 4}, r"run\.iterations = 4: run\.steps = 6 cannot be split"),
        ({"method__name": "rft"}, r"run\.iterations = 3: method\.source"),
        ({"model__lora": {"rank": 2}}, r"run\.iterations = 3: with adapters, the reference"),
        ({"method__name": "grpo-process"}, r'reward_model\.kind = "outcome": method\.credit = "step"'),
        ({"reward_model__kind": "process"}, r'reward_model\.kind = "process": method\.credit = "completion"'),
        ({"method__name": "grpo-process", "method__dynamic_sampling_rounds": 2}, r"dynamic_sampling_rounds = 2"),
        ({"reward_model__replay_fraction": 1.0}, r"reward_model\.replay_fraction = 1\.0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str, tiny_folder: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(rounds(tiny_folder, "outcome", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model__split": "nowhere:split"}, r"reward_model\.split"),
        ({"reward_model__name": "/nowhere"}, r"reward_model\.name = '/nowhere'"),
    ],
)
def test_a_missing_reward_model_is_reported_before_weights_are_loaded(
    changes: dict, message: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.training.setup.load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=message):
        train(rounds(tiny_folder, "process", **changes), prompts=ROWS, out=tmp_path / "run")
