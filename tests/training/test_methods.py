"""SFT, RFT, Online RFT and DPO: which completions they train on, and where the completions come from."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained, select
from gruppo.algorithms.losses import dpo_loss
from gruppo.config.loading import RecipeError, load_recipe, without_unused_fields
from gruppo.config.method_section import Method
from gruppo.config.methods import METHODS, describe_methods
from gruppo.errors import RunError, UsageError
from gruppo.models.loading import find_model, load_model
from gruppo.training.api import train
from gruppo.types import Group, Reward, Steps
from gruppo.utils.metrics import Metrics
from tests.conftest import make_group
from tests.small_runs import ROWS, recipe
from tests.training.test_invariance import TEMPERATURE, rows_logprobs


def selected(group: Group, settings: Method) -> list[bool]:
    mark_trained([group], False)
    select([group], settings)
    return group.trained


def test_rft_keeps_the_first_correct_completions_without_duplicates() -> None:
    settings = Method(name="rft", max_per_prompt=2)
    group = make_group([1, 2], [[3], [4], [3], [5], [6], [7]], [1.0, 1.0, 1.0, 0.0, 1.0, None])
    assert selected(group, settings) == [True, True, False, True, False, False]
    assign_advantages([group], settings, Metrics())
    assert [row[0] for row in group.advantages] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_group_that_is_not_trained_on_says_what_happened_to_its_completions() -> None:
    def reason(*rewards: Reward, truncated: bool = False) -> str:
        group = make_group([1], [[2]] * len(rewards), [0.0] * len(rewards))
        cut = [replace(one, finish_reason="length" if truncated else "eos") for one in group.completions]
        group = replace(group, rewards=list(rewards), completions=cut)
        mark_trained([group], mask_truncated=True)
        return str(group.skipped).removeprefix("no completion is trained on: ")

    none, failed, known = Reward(None, {"f": None}), Reward(None, {}, "f: broken"), Reward(1.0, {"f": 1.0})
    assert reason(none, none) == "no reward applies to them (all are None)"
    assert reason(failed) == "their rewards failed"
    assert reason(known, truncated=True) == "they were truncated"
    assert reason(none, failed) == "their rewards failed, or no reward applies to them (all are None)"


def test_the_recipe_defines_which_completions_are_correct() -> None:
    group = make_group([1], [[2], [3], [4]], [0.3, 0.2, 0.1])
    settings = Method(name="online-rft", success_threshold=0.2)
    assert selected(group, settings) == [True, True, True]
    assign_advantages([group], settings, Metrics())
    assert [row[0] for row in group.advantages] == [1.0, 0.0, 0.0]


def test_a_group_without_correct_completions_has_no_nonzero_advantage() -> None:
    group, settings = make_group([1], [[2], [3]], [0.0, 0.0]), Method(name="rft")
    selected(group, settings)
    assign_advantages([group], settings, Metrics())
    assert not group.has_nonzero_advantage
    assert group.skipped == "all advantages are 0: no completion is correct"


def test_pairs_match_correct_with_wrong_completions_in_order() -> None:
    settings = Method(name="dpo", max_per_prompt=2, aggregation="sequence-sum", dpo_beta=0.5)
    group = make_group([1], [[2, 3], [4], [5], [6], [7], [8]], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    assert selected(group, settings) == [True, True, True, True, False, False]
    group.old_logprobs = [[-1.0, -2.0], [-1.0], [-3.0], [-1.0], None, None]
    group.ref_logprobs = [[-1.5, -1.0], [-2.0], [-1.0], [-1.0], None, None]
    metrics = Metrics()
    assign_advantages([group], settings, metrics)
    # Δ by hand: completion 0: 0.5 - 1 = -0.5; 1: +1; 2: -2; 3: 0. Pairs (1, 0) and (2, 3), β = 1/2.
    first, second = (0.5 / (1 + math.exp(0.5 * margin)) for margin in (1.5, -2.0))
    assert group.advantages[0] == pytest.approx([-2 * first, -2 * first], abs=1e-12)
    assert group.advantages[1] == pytest.approx([2 * first], abs=1e-12)
    assert group.advantages[2] == pytest.approx([2 * second], abs=1e-12)
    assert group.advantages[3] == pytest.approx([-2 * second], abs=1e-12)
    values = metrics.reduce()
    assert values["dpo/loss"] == pytest.approx((math.log1p(math.exp(-0.75)) + math.log1p(math.exp(1.0))) / 2)
    assert values["dpo/margin"] == pytest.approx(-0.25)
    assert values["dpo/accuracy"] == 0.5


def test_a_group_without_a_pair_is_skipped_with_the_reason() -> None:
    group = make_group([1], [[2], [3]], [1.0, 1.0])
    assert selected(group, Method(name="dpo")) == [False, False]
    assert group.skipped == "no pair: the group has no correct completion, or no wrong one"


def test_pair_loss_has_the_gradient_of_its_coefficient() -> None:
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64).unbind()
    chosen.requires_grad_(True)
    rejected.requires_grad_(True)
    made = dpo_loss(chosen, rejected, 0.3)
    made.loss.sum().backward()
    torch.testing.assert_close(chosen.grad, -made.coefficient)
    torch.testing.assert_close(rejected.grad, made.coefficient)
    with pytest.raises(ValueError, match="beta = 0"):
        dpo_loss(chosen, rejected, 0.0)


def settings_of(model: str, method: str, **changes: Any) -> dict[str, Any]:
    made = recipe(model, **{"method__name": method, "reward__functions": ["tests/rewards/functions.py:likes_letters"]})
    del made["method"]["kl_coef"]
    for key, value in changes.items():
        section, _, field = key.partition("__")
        made.setdefault(section, {})[field] = value
    return without_unused_fields(made)


DEMONSTRATIONS = [{**row, "completion": f"{row['answer']}z"} for row in ROWS]
PREFERENCES = [{**row, "chosen": f"{row['answer']}z", "rejected": "qq"} for row in ROWS]


def without_reward(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: table for name, table in settings.items() if name != "reward"}


def test_sft_memorizes_its_rows(tiny_folder: str, tmp_path: Path) -> None:
    settings = without_reward(settings_of(tiny_folder, "sft", run__steps=40, optimizer__learning_rate=0.02))
    result = train(settings, prompts=DEMONSTRATIONS, out=tmp_path / "run")
    losses = [line["loss/total"] for line in result.metrics]
    assert losses[-1] < losses[0] / 4
    table = pq.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    assert all(row["sampling_logprobs"] is None for row in table)
    assert all(row["text"].endswith("z") for row in table)


def test_sft_loss_is_the_mean_over_every_completion(tiny_folder: str, tmp_path: Path) -> None:
    settings = without_reward(settings_of(tiny_folder, "sft", run__steps=1, sampling__temperature=TEMPERATURE))
    result = train(settings, prompts=DEMONSTRATIONS, out=tmp_path / "run")
    table = pq.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    policy = load_model(find_model(tiny_folder), dtype="float32")
    rows = [(row["prompt_token_ids"], row["token_ids"]) for row in table]
    with torch.no_grad():
        own = [float(each.mean()) for each in rows_logprobs(policy.model, rows, "none")]
    assert result.metrics[0]["loss/total"] == pytest.approx(-sum(own) / len(own), rel=1e-4)


@pytest.mark.parametrize("method", ["rft", "dpo"])
def test_frozen_completions_are_sampled_from_the_start_model(method: str, tiny_folder: str, tmp_path: Path) -> None:
    """After six steps at a high learning rate, they still have the initial model's probabilities."""
    settings = settings_of(
        tiny_folder, method, optimizer__learning_rate=0.02, method__success_threshold=0.2,
        sampling__temperature=TEMPERATURE,
    )  # fmt: skip
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    table = pq.read_table(tmp_path / "run/rollouts/step-000006.parquet").to_pylist()
    start = load_model(find_model(tiny_folder), dtype="float32")
    with torch.no_grad():
        for row in table:
            (own,) = rows_logprobs(start.model, [(row["prompt_token_ids"], row["token_ids"])], "none")
            torch.testing.assert_close(own, torch.tensor(row["sampling_logprobs"]), atol=1e-4, rtol=1e-4)
    assert "engine/logprob_difference_mean" not in result.metrics[-1]
    assert any(line["loss/total"] for line in result.metrics), "nothing was learned from"


def test_dpo_trains_on_rows_with_preferences(tiny_folder: str, tmp_path: Path) -> None:
    settings = without_reward(
        settings_of(
            tiny_folder, "dpo", method__source="dataset", method__aggregation="sequence-sum", run__steps=30,
            optimizer__learning_rate=0.01,
        )
    )  # fmt: skip
    result = train(settings, prompts=PREFERENCES, out=tmp_path / "run")
    first, last = result.metrics[0], result.metrics[-1]
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert last["dpo/loss"] < first["dpo/loss"]
    assert last["dpo/accuracy"] == 1.0


def test_step_rewards_are_learned_from(tiny_folder: str, tmp_path: Path) -> None:
    """The advantages in the rollouts follow §4.1.3, and the mean step reward rises."""
    settings = settings_of(
        tiny_folder, "grpo-process", reward__functions=["tests/rewards/functions.py:steps"], run__steps=25,
        optimizer__learning_rate=0.02, method__kl_coef=0.0,
    )  # fmt: skip
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    means = [line["reward/steps/step_mean"] for line in result.metrics]
    assert sum(means[-5:]) > sum(means[:5]) + 0.5
    table = pq.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    for index in range(4):
        rows = [row for row in table if row["group"] == index and row["trained"]]
        judged = [json.loads(row["steps"])["steps"] for row in rows]
        every = [value for own in judged for value in own["rewards"]]
        if len(set(every)) < 2:
            continue
        mean, std = statistics.mean(every), statistics.stdev(every)
        for row, own in zip(rows, judged, strict=True):
            for place, advantage in enumerate(row["advantages"]):
                pairs = zip(own["rewards"], own["ends"], strict=True)
                expected = sum((value - mean) / (std + 1e-6) for value, end in pairs if end >= place)
                assert advantage == pytest.approx(expected, abs=1e-9)


def test_outcome_and_step_rewards_are_normalized_separately_and_weighted() -> None:
    group = make_group([1], [[2, 3], [4, 5]], [10.0, 30.0])
    steps = [Steps((0.0, 1.0), (0, 1)), Steps((0.5,), (1,))]
    group.rewards = [
        Reward(reward.total, {}, steps={"judge": own}) for reward, own in zip(group.rewards, steps, strict=True)
    ]
    settings = Method(name="grpo-process")
    selected(group, settings)
    assign_advantages([group], settings, Metrics(), {"judge": 2.0})
    outcome, step = 1 / math.sqrt(2), 0.5 / 0.5  # (30 - 20) / std; step rewards 0, 1, ½ have std ½
    assert group.advantages[0] == pytest.approx([-outcome, -outcome + 2 * step], abs=1e-5)
    assert group.advantages[1] == pytest.approx([outcome, outcome], abs=1e-5)


def test_unused_step_rewards_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    settings = settings_of(tiny_folder, "grpo", reward__functions=["tests/rewards/functions.py:steps"])
    with pytest.raises(RunError, match="grpo-process"):
        train(settings, prompts=ROWS, out=tmp_path / "run")


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_without_completions_are_reported_with_the_expected_columns(
    method: str, tiny_folder: str, tmp_path: Path
) -> None:
    settings = without_reward(settings_of(tiny_folder, method, method__source="dataset"))
    with pytest.raises(UsageError, match=r"row 1: it has no completion .*chosen"):
        train(settings, prompts=ROWS, out=tmp_path / "run")


def test_preferences_are_not_demonstrations(tiny_folder: str, tmp_path: Path) -> None:
    settings = without_reward(settings_of(tiny_folder, "sft"))
    with pytest.raises(UsageError, match=r"prompts/0: it has no completion"):
        train(settings, prompts=PREFERENCES, out=tmp_path / "run")


def test_long_completions_are_refused_or_left_out(tiny_folder: str, tmp_path: Path) -> None:
    rows = [*DEMONSTRATIONS, {"prompt": "a", "completion": "z" * 20, "answer": "a"}]
    settings = without_reward(settings_of(tiny_folder, "sft"))
    with pytest.raises(UsageError, match=r"completion has 21 tokens, more than sampling.max_tokens = 8"):
        train(settings, prompts=rows, out=tmp_path / "run")
    result = train({**settings, "task": {"overlong": "filter"}}, prompts=rows, out=tmp_path / "filtered")
    assert result.summary["steps"] == 6


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "rft", "tis_cap": 2.0}, "tis_cap = 2.0"),
        ({"name": "sft", "dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds = 1"),
        ({"name": "rft", "scale": "group"}, 'scale = "group"'),
        ({"name": "dpo", "kl_coef": 0.1}, "kl_coef = 0.1"),
        ({"name": "dpo", "baseline": "group"}, "baseline = 'group'"),
        ({"name": "dpo", "aggregation": "constant"}, 'aggregation = "constant"'),
        ({"name": "dpo", "inner_updates": 2}, "inner_updates = 2"),
        ({"name": "dpo", "dpo_beta": 0.0}, "dpo_beta"),
    ],
)
def test_settings_that_contradict_each_other(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"model": {"name": "x"}, "method": method})


def test_rows_and_rewards_contradict_each_other(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="scores nothing"):
        load_recipe({**settings_of(tiny_folder, "sft"), "reward": {"functions": ["last_number"]}})
    with pytest.raises(UsageError, match="scores nothing"):
        train(
            without_reward(settings_of(tiny_folder, "sft")), prompts=DEMONSTRATIONS, reward="last_number", out=tmp_path
        )


def test_pairs_need_two_completions() -> None:
    with pytest.raises(RecipeError, match="group_size = 1"):
        load_recipe({"model": {"name": "x"}, "method": {"name": "dpo"}, "sampling": {"group_size": 1}})


def test_the_table_names_every_method() -> None:
    text = describe_methods()
    for name, row in METHODS.items():
        assert f"{name}  ({row.equation})" in text
