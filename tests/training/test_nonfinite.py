"""Nonfinite values stop a run before the optimizer step, and the batch is kept for inspection."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gruppo.training.policy_loss
from gruppo.config.method_section import Method
from gruppo.errors import RunError
from gruppo.models.footprint import trial_batch
from gruppo.models.loading import find_model, load_model
from gruppo.models.weights import weights_sha256
from gruppo.runs.reading import read_lines
from gruppo.training.nonfinite import load_batches, not_finite
from gruppo.training.policy_loss import batch_loss
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy
from tests.small_runs import small_run

PPO = {"method__name": "ppo"}


def times(factor: float, calls: int):
    """The policy's loss, multiplied by `factor` from a certain call on."""
    original, count = gruppo.training.policy_loss.policy_loss, 0

    def scaled(*args):
        nonlocal count
        count += 1
        result = original(*args)
        return result._replace(loss=result.loss * factor) if count >= calls else result

    return scaled


def reference_fails(policy, batch, temperature, original=gruppo.training.policy_loss.score):
    logprobs, entropy = original(policy, batch, temperature)
    return (logprobs if torch.is_grad_enabled() else logprobs * -math.inf), entropy


# Name -> what is patched, the replacement, changes to the recipe, and the expected message.
PLACES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "loss": ("gruppo.training.policy_loss.policy_loss", times(math.nan, 1), {}, r"the loss of step 1 is nan"),
    "gradient": (
        "gruppo.training.policy_loss.policy_loss", times(1e38, 1), {}, r"the gradient norm of step 1 is (inf|nan)",
    ),
    "second inner update": (
        "gruppo.training.policy_loss.policy_loss", times(math.nan, 2), {"method__inner_updates": 3},
        r"the loss of step 1, inner update 2 is nan",
    ),
    "reference": (
        "gruppo.training.policy_loss.score", reference_fails, {},
        r"the loss of step 1 is .*not finite in it: ref_logprobs",
    ),
    "reference before the update": (
        "gruppo.training.policy_loss.score", reference_fails, PPO, r"the old_logprobs of step 1 is nan.*, ref_logprobs",
    ),
    "value model": (
        "gruppo.training.value_model.value_loss", lambda *_: torch.tensor(math.inf, requires_grad=True), PPO,
        r"the value model's loss of step 1 is inf.*lower critic\.learning_rate",
    ),
    "adapters": (
        "gruppo.training.policy_loss.policy_loss", times(math.nan, 1), {"model__lora": {"rank": 2}},
        r"the loss of step 1 is nan",
    ),
    "reward model": (
        "gruppo.training.reward_model.reward_model_loss", lambda *_: torch.tensor(math.nan, requires_grad=True),
        {"reward_model__prompts": 6}, r"the reward model's loss of step 1 is nan.*lower reward_model\.learning_rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_nonfinite_value_stops_the_run_before_the_optimizer_and_keeps_the_batch(
    place: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, patched, changes, message = PLACES[place]
    moved: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: moved.append(1) or step(*args, **kwargs))
    with monkeypatch.context() as patch:
        patch.setattr(target, patched)
        with pytest.raises(RunError, match=message):
            small_run(tiny_folder, tmp_path / "run", run__steps=1, **changes)
    assert len(moved) == (place in {"second inner update", "value model"}), "only what came before"
    path = tmp_path / "run" / "nonfinite-step-000001.json"
    record = json.loads(path.read_text())
    assert math.isfinite(float(record["value"])) is False
    event = read_lines(tmp_path / "run" / "events.jsonl")[-1]
    assert (event["kind"], event["file"]) == ("nonfinite", path.name)
    assert str(path) in event["message"]
    batches = load_batches(path)
    assert len(batches) == record["micro_batches"] == len(record["batches"])
    texts = [completion for batch in record["batches"] for completion in batch["completions"]]
    assert len(texts) == sum(len(batch.members) for batch in batches) > 0
    assert all(len(each["prompt"]) == 2 for each in texts), "the questions are two letters"
    assert not list((tmp_path / "run").rglob("*.writing"))


def test_a_kept_batch_can_be_recomputed(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.training.policy_loss.policy_loss", times(math.nan, 1))
        with pytest.raises(RunError, match="not applied"):
            small_run(tiny_folder, tmp_path / "run", run__steps=1, method__kl_coef=0.0)
    (batch,) = load_batches(tmp_path / "run" / "nonfinite-step-000001.json")
    kept = load_file(tmp_path / "run" / "nonfinite-step-000001-0.safetensors")
    policy = load_model(find_model(tiny_folder, NullProgress()), "cpu", "float32")
    first = batch.old_logprobs
    batch.old_logprobs = None
    with policy.precision():
        loss = batch_loss(policy, None, batch, Method(kl_coef=0.0), 1.0, Metrics())
    assert math.isfinite(float(loss.detach()))
    assert batch.old_logprobs is not None
    torch.testing.assert_close(batch.old_logprobs, first, rtol=0, atol=0)
    assert {"token_ids", "targets", "advantages", "weights", "sampling_logprobs"} <= set(kept)


def test_the_weights_are_unchanged(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.training.policy_loss.policy_loss", times(1e38, 1))
        with pytest.raises(RunError, match="not applied"):
            small_run(tiny_folder, tmp_path / "run", run__steps=1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    start = load_model(find_model(tiny_folder, NullProgress()), "cpu", "float32").model
    assert summary["weights_sha256"] == weights_sha256(start)


def test_completions_from_rows_do_not_count_as_nonfinite() -> None:
    batch = trial_batch(make_policy(), [(2, [1, 1])])
    batch.sampling_logprobs = None
    assert not_finite(batch) == {}
    batch.advantages[1] = math.inf
    assert not_finite(batch) == {"advantages": 1}
    batch.weights[1] = 0.0
    assert not_finite(batch) == {}, "a token that is not trained on"
