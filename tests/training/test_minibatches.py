"""`method.minibatches`: several updates over parts of a step's completions, each with denominators of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import gruppo
from gruppo.algorithms.aggregation import group_token_mean_weights, sequence_mean_weights, token_mean_weights
from gruppo.config.loading import load_recipe
from gruppo.config.method_section import Method
from gruppo.errors import UsageError
from gruppo.models.packing import Part, pack, split
from gruppo.training.policy_loss import batch_loss
from gruppo.utils.metrics import Metrics
from tests.conftest import make_group, make_policy, random_groups
from tests.small_runs import ROWS, at_call, killed, recipe, small_run
from tests.training.test_invariance import TEMPERATURE, prepared

SETTINGS = Method(kl_coef=0.05)
CHANGES: dict[str, Any] = {
    "run__steps": 1,
    "model__dtype": "float64",
    "method__inner_updates": 2,
    "method__minibatches": 2,
    "optimizer__learning_rate": 3e-2,
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0,
    "optimizer__max_grad_norm": 0.5,
    "optimizer__weight_decay": 0.1,
}


def sizes(part: Part) -> list[int]:
    return [len(numbers) for numbers in part]


def test_whole_groups_are_split_in_order() -> None:
    groups = [make_group([1], [[2], [3]], [0.0, 1.0]) for _ in range(5)]
    assert [sizes(part) for part in split(groups, 2)] == [[2, 2, 2, 0, 0], [0, 0, 0, 2, 2]]
    assert [sizes(part) for part in split(groups, 1)] == [[2] * 5]
    assert [sum(sizes(part)) for part in split(groups, 5)] == [2] * 5


def test_completions_are_split_if_there_are_fewer_groups_than_parts() -> None:
    groups = [make_group([1], [[2], [3], [4], [5]], [0.0] * 4) for _ in range(2)]
    assert split(groups, 4) == [[[0, 1], []], [[2, 3], []], [[], [0, 1]], [[], [2, 3]]]
    assert [sum(sizes(part)) for part in split(groups, 3)] == [3, 3, 2]
    assert [sum(sizes(part)) for part in split(groups[:1], 6)] == [1, 1, 0, 1, 1, 0]
    assert split([], 2) == [[], []]


def test_every_completion_is_in_one_part() -> None:
    groups = random_groups(groups=7, size=5)
    for parts in (1, 2, 3, 6, 9, 35, 50):
        places = [
            (index, number) for part in split(groups, parts) for index, numbers in enumerate(part) for number in numbers
        ]
        assert places == [(i, n) for i, group in enumerate(groups) for n in range(len(group.completions))]


@pytest.mark.parametrize("weights", [sequence_mean_weights, group_token_mean_weights, token_mean_weights])
@pytest.mark.parametrize("budget", [30, 10**9])
def test_a_part_is_a_step_of_its_groups_alone(weights: Any, budget: int) -> None:
    """Micro-batches of a part have the tensors that they have if no other groups were sampled."""
    groups = prepared(random_groups(groups=5))
    for part, alone in zip(split(groups, 2), (groups[:3], groups[3:]), strict=True):
        found = pack(groups, weights, budget, True, part=part)
        expected = pack(alone, weights, budget, True)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)
            assert torch.equal(one.weights, other.weights)
            assert torch.equal(one.advantages, other.advantages)


def test_without_an_update_in_between_the_parts_add_up_to_the_step() -> None:
    """Parts with equal numbers of groups: the mean of their gradients is the gradient of the whole step."""
    policy, reference = make_policy(torch.float64), make_policy(torch.float64, seed=1)
    groups = prepared(random_groups(groups=4))

    def gradient(parts: list[Part]) -> dict[str, torch.Tensor]:
        policy.model.zero_grad(set_to_none=True)
        for part in parts:
            for batch in pack(groups, sequence_mean_weights, 60, True, part=part):
                (batch_loss(policy, reference, batch, SETTINGS, TEMPERATURE, Metrics()) / len(parts)).backward()
        return {name: each.grad.clone() for name, each in policy.model.named_parameters() if each.grad is not None}

    whole, parts = gradient(split(groups, 1)), gradient(split(groups, 2))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-12)


def rows_of(out: Path) -> list[list[dict[str, Any]]]:
    rows = pq.read_table(out / "rollouts" / "step-000001.parquet").to_pylist()
    return [[row for row in rows if row["group"] == group] for group in range(rows[-1]["group"] + 1)]


def initial(folder: str) -> torch.nn.Module:
    """The model in the folder, in float64 (also its rotary tables, which transformers would compute in float32)."""
    model = make_policy(torch.float64).model
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    return model


def naive_logprobs(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    prompt, completion = row["prompt_token_ids"], row["token_ids"]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


def test_a_step_equals_four_plain_updates(tiny_folder: str, tmp_path: Path) -> None:
    """Two rounds over two halves of the groups by plain torch: Eq. 3 one completion at a time, π_old from before."""
    result = small_run(tiny_folder, tmp_path / "run", **CHANGES)
    groups = rows_of(tmp_path / "run")
    assert [len(group) for group in groups] == [4, 4, 4, 4]
    model = initial(tiny_folder)
    with torch.no_grad():
        old = {id(row): naive_logprobs(model, row) for group in groups for row in group}
    settings = load_recipe(recipe(tiny_folder)).optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-2,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    for half in (groups[:2], groups[2:]) * 2:
        optimizer.zero_grad()
        for group in half:
            rewards = torch.tensor([row["reward"] for row in group], dtype=torch.float64)
            for row, reward in zip(group, rewards, strict=True):
                logprobs = naive_logprobs(model, row)
                ratio, advantage = (logprobs - old[id(row)]).exp(), (reward - rewards.mean()) / (rewards.std() + 1e-6)
                policy = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                difference = old[id(row)] - logprobs  # the reference is the initial policy, which sampled
                kl = difference.exp() - difference - 1
                (-(policy - 0.02 * kl).mean() / (4 * 2)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    trained = load_file(result.path / "checkpoints" / "step-000001" / "weights.safetensors")
    expected = dict(model.named_parameters())
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=0, atol=1e-9)
    before = dict(initial(tiny_folder).named_parameters())
    assert all((value - before[name]).abs().max() > 1e-2 for name, value in trained.items())


@pytest.mark.parametrize("source", ["trainer", "engine"])
def test_recorded_numbers_are_those_of_the_policy_that_sampled(source: str, tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", **CHANGES, method__old_logprobs=source)
    model = initial(tiny_folder)
    for group in rows_of(tmp_path / "run"):
        for row in group:
            with torch.no_grad():
                expected = naive_logprobs(model, row).tolist()
            assert row["old_logprobs"] == pytest.approx(expected, abs=1e-5)
            assert row["ref_logprobs"] == pytest.approx(expected, abs=1e-5)
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["engine/logprob_difference_max"] < 1e-5
    assert line["policy/ratio_max"] > 1.01


def test_one_minibatch_is_the_default(tiny_folder: str, tmp_path: Path) -> None:
    first = small_run(tiny_folder, tmp_path / "first", run__steps=2)
    second = small_run(tiny_folder, tmp_path / "second", run__steps=2, method__minibatches=1)
    assert first.summary["weights_sha256"] == second.summary["weights_sha256"]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_memory_that_runs_out_changes_only_sizes(
    method: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the second update: π_old of its minibatch moves with its tokens to smaller micro-batches."""
    changes = CHANGES | {"method__name": method, "run__steps": 2}
    whole = small_run(tiny_folder, tmp_path / "whole", **changes)

    def fails() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        at_call(patch, "gruppo.training.policy_trainer.batch_loss", 2, fails)
        halved = small_run(tiny_folder, tmp_path / "halved", **changes)
    assert halved.events()["kind"].tolist() == ["memory"]
    for before, after in zip(whole.metrics, halved.metrics, strict=True):
        for name, value in before.items():
            if not name.startswith(("time/", "memory/")):
                assert after[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_a_killed_run_resumes_and_reproduces_bit_for_bit(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CHANGES | {"run__steps": 4, "model__dtype": "float32"}
    whole = small_run(tiny_folder, tmp_path / "whole", **changes)
    with killed(monkeypatch, "gruppo.training.policy_trainer.batch_loss", 11):  # in the second minibatch of step 3
        small_run(tiny_folder, tmp_path / "run", **changes)
    resumed = small_run(tiny_folder, tmp_path / "run", resume=True, **changes)
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    again = gruppo.reproduce(tmp_path / "run", 4, prompts=ROWS, progress=False)
    assert again.equal, again.differences


@pytest.mark.parametrize(
    ("method", "minibatches", "word"),
    [
        ({"name": "grpo"}, 17, "a step has only 16 completions"),
        ({"name": "online-rft"}, 2, 'surrogate = "log-likelihood"'),
        ({"name": "dpo"}, 2, "minibatches = 2"),
    ],
)
def test_impossible_minibatches_are_refused(method: dict, minibatches: int, word: str, tiny_folder: str) -> None:
    data = recipe(tiny_folder)
    data["method"] = {**method, "minibatches": minibatches}
    with pytest.raises(UsageError, match=word):
        load_recipe(data)


def test_epsilon_beside_the_standard_deviation(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", run__steps=1, method__advantage_epsilon=0.25)
    compared = 0
    for group in rows_of(tmp_path / "run"):
        rewards = torch.tensor([row["reward"] for row in group], dtype=torch.float64)
        if rewards.std() > 0:
            expected = (rewards - rewards.mean()) / (rewards.std() + 0.25)
            assert [row["advantages"][0] for row in group] == pytest.approx(expected.tolist(), abs=1e-6)
            compared += 1
    assert compared


def test_a_step_without_groups_has_no_minibatches() -> None:
    assert [pack([], sequence_mean_weights, 10, True, part=part) for part in split([], 3)] == [[], [], []]
