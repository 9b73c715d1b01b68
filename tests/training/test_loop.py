"""The whole loop on the tiny model: it learns, records everything, and reports what it could not do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import gruppo
import gruppo.training.policy_loss
from gruppo.config.schedule import learning_rate
from gruppo.config.sections import Optimizer
from gruppo.data.mixture import draw_prompts
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import RunError, UsageError
from gruppo.models.weights import weights_sha256
from gruppo.runs.reading import read_lines
from gruppo.training.api import Result, train
from gruppo.types import Prompt
from tests.rewards.functions import likes_letters
from tests.small_runs import ROWS, recipe, small_run


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The held-out questions are the prompts; the grader expects the answer as the whole text."""
    out = tmp_path_factory.mktemp("loop") / "run"
    (out.parent / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    return small_run(
        tiny_folder, out, evaluation__task=str(out.parent / "test.jsonl"), evaluation__grader="exact_match",
        evaluation__every=3, evaluation__questions=4, method__inner_updates=2,
    )  # fmt: skip


def test_reward_rises(tiny_folder: str, tmp_path: Path) -> None:
    """From chance (13 of 47 tokens) to most of the tokens, in twenty steps that take a few seconds."""
    result = small_run(
        tiny_folder, tmp_path / "run", run__steps=20, run__checkpoint_every=20, optimizer__learning_rate=1e-2,
        sampling__prompts_per_step=8, sampling__group_size=8, method__kl_coef=0.0,
    )  # fmt: skip
    rewards = [line["reward/mean"] for line in result.metrics]
    assert sum(rewards[:3]) / 3 < 0.45
    assert sum(rewards[-3:]) / 3 > 0.8


def test_summary(finished: Result) -> None:
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary == finished.summary
    assert set(summary) == {
        "state", "steps", "train_seconds", "accuracy_before", "accuracy_after", "interval_before", "interval_after",
        "questions", "benchmarks", "peak_memory_bytes", "weights_sha256",
    }  # fmt: skip
    assert summary["state"] == "done"
    assert summary["steps"] == 6
    assert summary["questions"] == 4
    assert summary["train_seconds"] > 0
    low, high = summary["interval_after"]
    assert 0 <= low <= summary["accuracy_after"] <= high <= 1


def test_transformers_loads_the_trained_model(finished: Result) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(finished.path / "model")
    assert weights_sha256(loaded) == finished.summary["weights_sha256"]
    assert weights_sha256(finished.load_model()) == finished.summary["weights_sha256"]


def test_every_step_has_its_metrics(finished: Result) -> None:
    steps = [line for line in finished.metrics if "reward/mean" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert {
            "reward/mean", "reward/std", "reward/likes_letters/mean", "groups/nonzero_advantage", "reward/excluded",
            "advantage/max", "advantage/min", "policy/ratio_mean", "policy/ratio_max", "policy/clipped_low",
            "policy/clipped_high", "policy/kl", "engine/logprob_difference_mean", "engine/logprob_difference_max",
            "policy/entropy", "completion/length", "completion/truncated", "optimizer/gradient_norm",
            "optimizer/learning_rate", "time/tokens_per_second", "time/generate", "time/reward", "time/update",
            "memory/peak_bytes",
            "loss/total",
        } <= set(line)  # fmt: skip
        assert line["engine/logprob_difference_max"] < 1e-4
    assert steps[0]["policy/kl"] < steps[-1]["policy/kl"]
    assert steps[0]["policy/ratio_max"] > 1, "two inner updates: the second is off policy"


def test_learning_rate_of_the_run_follows_its_schedule(finished: Result) -> None:
    settings = Optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=1)
    rates = [line["optimizer/learning_rate"] for line in finished.metrics if "reward/mean" in line]
    assert rates == [learning_rate(settings, step, 6) for step in range(6)]


def test_schedules_by_hand() -> None:
    def rates(schedule: str, warmup: int) -> list[float]:
        settings = Optimizer(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
        return [learning_rate(settings, step, 6) for step in range(6)]

    assert rates("constant", 2) == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear", 2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine", 2) == pytest.approx([0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert rates("linear", 0)[0] == 1


def test_evaluations_before_during_and_after(finished: Result) -> None:
    lines = [line for line in finished.metrics if "eval/accuracy" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    for step in (0, 3, 6):
        rows = pq.read_table(finished.path / f"evaluations/step-{step:06d}.parquet").to_pylist()
        assert [row["question"] for row in rows] == [row["prompt"] for row in ROWS[:4]]
        assert ["".join(row["prompt_token_texts"]) for row in rows] == [row["prompt"] for row in ROWS[:4]]
        for row in rows:
            assert len(row["token_texts"]) == len(row["token_ids"])
            assert "".join(row["token_texts"]).removesuffix("<eos>") == row["answer"]


def test_rollouts_hold_everything(finished: Result) -> None:
    for step in range(1, 7):
        rows = pq.read_table(finished.path / f"rollouts/step-{step:06d}.parquet").to_pylist()
        assert len(rows) == 16
        for row in rows:
            lists = (
                "token_ids",
                "token_texts",
                "mask",
                "sampling_logprobs",
                "old_logprobs",
                "ref_logprobs",
                "entropy",
                "advantages",
            )
            assert len({len(row[name]) for name in lists}) == 1
            assert len(row["prompt_token_texts"]) == len(row["prompt_token_ids"])
            assert "".join(row["prompt_token_texts"]) == row["prompt"]
            assert row["policy_version"] == step - 1
            expected = sum("a" <= letter <= "m" for letter in row["text"]) / max(1, len(row["text"]))
            assert row["reward"] == pytest.approx(expected)
        line = next(line for line in finished.metrics if line["step"] == step and "reward/mean" in line)
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / 16)
        entropies = [entropy for row in rows for entropy in row["entropy"]]
        assert line["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies))
        assert 0 < min(entropies) <= max(entropies) <= math.log(48) + 1e-6


def test_trained_ids_are_those_sampled(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl#5224, verl#6719: token ids go from the engine to the loss; text is never tokenized again."""
    sampled, trained = [], []
    stream, score = NativeEngine.stream, gruppo.training.policy_loss.score

    def keeps_sampled(*args):
        for index, group in stream(*args):
            sampled.extend(list(completion.token_ids) for completion in group)
            yield index, group

    def keeps_trained(policy, batch, temperature):
        start = 0
        for _, _, length in batch.members:
            trained.append(batch.targets[start : start + length].tolist())
            start += length
        return score(policy, batch, temperature)

    monkeypatch.setattr(NativeEngine, "stream", keeps_sampled)
    monkeypatch.setattr("gruppo.training.policy_loss.score", keeps_trained)
    small_run(tiny_folder, tmp_path / "r", run__steps=1, method__kl_coef=0.0)
    assert trained
    assert all(ids in sampled for ids in trained)


def test_every_question_is_sampled_once_per_epoch(finished: Result) -> None:
    """Four of eighteen prompts per step: no question is repeated before step 5."""
    asked = []
    for step in range(1, 5):
        rows = pq.read_table(finished.path / f"rollouts/step-{step:06d}.parquet").to_pylist()
        asked += [row["prompt_id"] for row in rows if row["completion"] == 0]
    assert len(asked) == len(set(asked)) == 16


def test_run_folder_is_complete(finished: Result) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names >= {
        "recipe.toml", "environment.json", "metrics.jsonl", "rollouts", "evaluations", "checkpoints", "base",
        "model", "summary.json",
    }  # fmt: skip
    assert not [path for path in finished.path.rglob("*") if "writing" in path.name]
    environment = json.loads((finished.path / "environment.json").read_text())
    assert environment["chosen"]["dtype"] == "float32"
    assert environment["packages"]["torch"] == torch.__version__
    checkpoints = sorted(path.name for path in (finished.path / "checkpoints").iterdir())
    assert checkpoints[-2:] == ["step-000004", "step-000006"]


def test_a_step_without_nonzero_advantage_makes_no_update_and_reports_it(tiny_folder: str, tmp_path: Path) -> None:
    """trl#3452: "loss = 0, is it training?"."""
    same = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    result = train(
        recipe(tiny_folder, run__steps=2, method__kl_coef=0.0), reward=same, prompts=ROWS, out=tmp_path / "r"
    )
    before = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert result.summary["weights_sha256"] == weights_sha256(before)
    events = [event for event in read_lines(tmp_path / "r" / "events.jsonl") if event["kind"] == "no_nonzero_advantage"]
    assert len(events) == 2
    assert "every trained completion has the same reward" in events[0]["message"]
    assert "not updated" in events[0]["message"]
    assert result.metrics[0]["groups/nonzero_advantage"] == 0
    rows = pq.read_table(tmp_path / "r" / "rollouts" / "step-000001.parquet").to_pylist()
    assert all("same reward" in row["skipped"] for row in rows)


def test_failed_rewards_are_events_and_give_no_advantage(tiny_folder: str, tmp_path: Path) -> None:
    def breaks(completions, **kwargs):
        raise RuntimeError("no")

    settings = recipe(tiny_folder, run__steps=1, reward__failure_limit=1.0)
    result = train(settings, reward=breaks, prompts=ROWS, out=tmp_path / "r")
    assert result.metrics[0]["reward/mean"] is None
    assert result.metrics[0]["reward/excluded"] == 1
    events = read_lines(tmp_path / "r" / "events.jsonl")
    assert "not updated" in events[-1]["message"], "nothing was trained on, so the KL term moves nothing either"
    assert sum(event["completions"] for event in events if event["kind"] == "reward_failed") == 16
    assert "RuntimeError: no" in events[0]["message"]


def test_a_nonfinite_metric_is_null(tiny_folder: str, tmp_path: Path) -> None:
    def logs(completions, log_metric, **kwargs):
        log_metric("odd", float("nan"))
        return [1e308 * (index % 2) for index in range(len(completions))]

    result = train(recipe(tiny_folder, run__steps=1), reward=logs, prompts=ROWS, out=tmp_path / "r")
    assert result.metrics[0]["reward/log/odd"] is None
    assert result.metrics[0]["reward/mean"] is None, "their sum overflows"
    assert result.metrics[0]["groups/nonzero_advantage"] == 1


def test_a_group_of_one_runs_without_nonzero_advantage(tiny_folder: str, tmp_path: Path) -> None:
    result = small_run(tiny_folder, tmp_path / "r", run__steps=1, sampling__group_size=1, method__kl_coef=0.0)
    assert result.metrics[0]["groups/nonzero_advantage"] == 0


def test_everything_truncated_and_masked(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No EOS token is ever sampled: nothing is trained on, not even the KL term has an effect, and this is reported."""
    monkeypatch.setattr("gruppo.models.compatibility.eos_ids", lambda *_: ())
    result = small_run(tiny_folder, tmp_path / "r", run__steps=1, method__mask_truncated=True, method__kl_coef=0.5)
    assert result.metrics[0]["completion/truncated"] == 1
    assert result.metrics[0]["completion/trained"] == 0
    assert result.summary["weights_sha256"] == weights_sha256(AutoModelForCausalLM.from_pretrained(tiny_folder))
    (event,) = read_lines(tmp_path / "r" / "events.jsonl")
    assert "no completion is trained on" in event["message"]
    assert "not updated" in event["message"]


def test_non_finite_loss_stops_before_the_optimizer(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gruppo.training.policy_loss.policy_loss
    monkeypatch.setattr(
        "gruppo.training.policy_loss.policy_loss",
        lambda *args: (result := original(*args))._replace(loss=result.loss * math.nan),
    )
    with pytest.raises(RunError, match="this update was not applied"):
        small_run(tiny_folder, tmp_path / "r", run__steps=1)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["state"] == "failed"
    assert summary["weights_sha256"] == weights_sha256(AutoModelForCausalLM.from_pretrained(tiny_folder))
    assert list((tmp_path / "r").glob("nonfinite-step-000001-*.safetensors"))
    assert [event["kind"] for event in read_lines(tmp_path / "r" / "events.jsonl")] == ["nonfinite"]


def test_diverged_policy_stops_with_the_reason(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finite"):
        small_run(tiny_folder, tmp_path / "r", optimizer__learning_rate=1e38)
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["state"] == "failed"


def test_python_interface(tiny_folder: str, tmp_path: Path) -> None:
    """gruppo.train with a reward function, rows, and several weighted rewards."""
    result = gruppo.train(
        recipe(tiny_folder, run__steps=1, reward__functions=[], reward__weights=[1.0, 0.5]),
        reward=[likes_letters, "exact_match"],
        prompts=ROWS,
        out=tmp_path / "run",
    )
    assert result.path == tmp_path / "run"
    line = result.metrics[0]
    assert line["reward/mean"] == pytest.approx(
        line["reward/likes_letters/mean"] + 0.5 * line["reward/exact_match/mean"]
    )
    assert "in-memory:likes_letters" in (tmp_path / "run" / "recipe.toml").read_text()


def test_questions_may_be_longer_than_prompts_if_they_fit(tiny_folder: str, tmp_path: Path) -> None:
    """Prompts and questions have separate token limits."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 120, "answer": "a"}) + "\n")
    changes = {"evaluation__task": str(long), "evaluation__grader": "exact_match", "evaluation__max_tokens": 5}
    assert (
        small_run(tiny_folder, tmp_path / "r", run__steps=1, sampling__max_tokens=20, **changes).summary["questions"]
        == 1
    )


def test_weights_must_match_the_reward_functions(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must have one weight per function"):
        train(recipe(tiny_folder, reward__weights=[5.0]), reward=[likes_letters, "exact_match"], prompts=ROWS,
              out=tmp_path / "r")  # fmt: skip


def test_bfloat16_run(tiny_folder: str, tmp_path: Path) -> None:
    result = small_run(tiny_folder, tmp_path / "r", run__steps=2, model__dtype="bfloat16")
    assert result.summary["state"] == "done"
    assert 0 < result.metrics[0]["engine/logprob_difference_max"] < 0.5


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"reward__functions": ["numbr"]}, "numbr"),
        ({"reward__functions": ["tests/rewards/functions.py:needs_more"]}, "solution"),
        ({"evaluation__questions": 3}, r"evaluation\.task"),
        (
            {
                "evaluation__task": "tests/functions_of_users.py:task",
                "evaluation__grader": "tests/functions_of_users.py:asynchronous",
            },
            "grader",
        ),
        (
            {
                "evaluation__task": "tests/functions_of_users.py:task",
                "evaluation__grader": "tests/functions_of_users.py:raises",
            },
            "grader",
        ),
        ({"evaluation__task": "tests/functions_of_users.py:broken_task"}, "RuntimeError"),
        ({"evaluation__task": "tests/functions_of_users.py:no_rows"}, "not a list of rows"),
        ({"reward__weights": [1.0], "reward__functions": ["last_number"]}, "answer = 'a' contains no number"),
        ({"sampling__max_tokens": 1000}, "context of 128"),
    ],
)
def test_invalid_data_and_rewards_are_reported_before_weights_are_loaded(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, word: str
) -> None:
    monkeypatch.setattr("gruppo.training.setup.load_model", None)
    with pytest.raises(UsageError, match=word):
        small_run(tiny_folder, tmp_path / "r", **changes)
    small = [path.name for path in (tmp_path / "r").iterdir()] if (tmp_path / "r").exists() else []
    assert set(small) <= {"lock", "rewards.log"}, "the folder is still free for another try"


def test_groups_without_nonzero_advantage_are_dropped_and_replaced(tiny_folder: str, tmp_path: Path) -> None:
    """DAPO: a step trains on as many groups with nonzero advantages as requested; others are recorded as dropped."""
    result = small_run(
        tiny_folder, tmp_path / "run", method__dynamic_sampling_rounds=30, method__kl_coef=0.0, run__steps=3,
        run__seed=1, reward__functions=["tests/rewards/functions.py:begins_with_a_letter"],
    )  # fmt: skip
    sampled = []
    for step in (1, 2, 3):
        rows = pq.read_table(result.path / f"rollouts/step-{step:06d}.parquet").to_pylist()
        groups = {row["group"]: row for row in rows}
        kept = [group for group, row in groups.items() if row["skipped"] is None]
        assert len(kept) == 4
        for row in rows:
            assert row["trained"] == (row["group"] in kept)
            assert row["group"] in kept or "dropped" in row["skipped"]
        sampled += [groups[number]["prompt"] for number in sorted(groups)]
    assert len(sampled) > 12, "nothing was ever refilled"
    numbered = [Prompt(str(number), row["prompt"], (1,), "t", {}) for number, row in enumerate(ROWS)]
    wanted = draw_prompts(numbered, 1, 0, len(sampled))
    assert sampled == [prompt.content for prompt in wanted], (
        "every prompt of the order once, in dynamic sampling and in later steps"
    )
    assert read_lines(result.path / "events.jsonl") == []


def test_dynamic_sampling_is_bounded_and_reports_when_it_gives_up(tiny_folder: str, tmp_path: Path) -> None:
    result = small_run(
        tiny_folder, tmp_path / "run", method__dynamic_sampling_rounds=2, method__kl_coef=0.0, run__steps=1,
        reward__functions=["tests/rewards/functions.py:waits"],
    )  # fmt: skip
    rows = pq.read_table(result.path / "rollouts/step-000001.parquet").to_pylist()
    assert {row["group"] for row in rows} == set(range(12)), "four groups, and four in each of two rounds"
    kinds = [event["kind"] for event in read_lines(result.path / "events.jsonl")]
    assert kinds == ["dynamic_sampling_exhausted", "no_nonzero_advantage"]
    assert "optimizer/gradient_norm" not in result.metrics[0], "no update"


def test_a_step_trains_on_the_groups_that_dynamic_sampling_kept(tiny_folder: str, tmp_path: Path) -> None:
    """Dropped groups count in no denominator: the update equals that of the kept groups alone."""
    changes = {"method__name": "dapo", "run__steps": 1, "run__checkpoint_every": 1,
               "reward__functions": ["tests/rewards/functions.py:begins_with_a_letter"]}  # fmt: skip
    settings = recipe(tiny_folder, **changes)
    refilled = train(settings, prompts=ROWS, out=tmp_path / "refilled")
    rows = pq.read_table(refilled.path / "rollouts/step-000001.parquet").to_pylist()
    advantages = [row["advantages"][0] for row in rows if row["trained"]]
    assert len(advantages) == 16
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    assert all(not any(row["advantages"]) for row in rows if not row["trained"])
