"""The value model of PPO: its values and gradient, and PPO runs that train and resume with it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained
from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.method_section import Critic, Method
from gruppo.errors import UsageError
from gruppo.models.packing import pack
from gruppo.models.weights import save_model
from gruppo.training.api import train
from gruppo.training.policy_loss import keep_logprobs, score_batches
from gruppo.training.value_model import ScalarModel, critic_loss, score_values
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from tests.conftest import make_completion, make_policy, random_groups
from tests.small_runs import ROWS, recipe

CPU = torch.device("cpu")


def critic64(seed: int = 3) -> ScalarModel:
    made = ScalarModel.on(make_policy(torch.float64, seed=seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(made.head.weight)
    return made


def plain_values(critic: ScalarModel, group: Group, number: int) -> Tensor:
    """Values of the states before each token and after the last, computed by plain transformers."""
    prompt, own = group.prompt.token_ids, group.completions[number].token_ids
    decoder = critic.policy.model.get_decoder()
    hidden = decoder(input_ids=torch.tensor([[*prompt, *own]])).last_hidden_state[0]
    return critic.head(hidden[len(prompt) - 1 :])[:, 0]


def valued(groups: list[Group], critic: ScalarModel, budget: int) -> list[Group]:
    mark_trained(groups, False)
    score_values(critic, groups, budget, CPU)
    return groups


def test_values_start_at_zero() -> None:
    groups = valued(random_groups(), ScalarModel.on(make_policy()), 10**9)
    assert all(not any(own or []) for group in groups for own in group.values)


@pytest.mark.parametrize("budget", [10**9, 20])
def test_values_equal_the_output_of_the_module(budget: int) -> None:
    critic, groups = critic64(), random_groups()
    cut = make_completion(list(groups[1].completions[2].token_ids), "length")
    groups[1].completions = [*groups[1].completions[:2], cut, groups[1].completions[3]]
    valued(groups, critic, budget)
    for group in groups:
        for number, own in enumerate(group.values):
            with torch.no_grad():
                expected = plain_values(critic, group, number).tolist()
            if group.completions[number] is not cut:
                expected[-1] = 0.0  # the completion finished (EOS)
            assert own == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("budget", [10**9, 20])
def test_loss_and_gradient_equal_the_formula(budget: int) -> None:
    """½ E[1/|o| Σ max((V - R)², (clipped - R)²)] over transformers' forward pass, with values that have changed."""
    critic, reference, settings = critic64(), make_policy(torch.float64, seed=1), Critic(gamma=0.9, gae_lambda=0.8)
    groups, method = random_groups(), Method(name="ppo", clip_low=0.2)
    policy = make_policy(torch.float64)
    valued(groups, critic, budget)
    before = pack(groups, sequence_mean_weights, budget, with_kl=True)
    score_batches(policy, reference, before, 1.0, Metrics())
    keep_logprobs(groups, before)
    assign_advantages(groups, method, Metrics(), critic=settings)
    with torch.no_grad():
        for each in critic.module.parameters():
            each.add_(0.05 * torch.randn_like(each))
    critic.policy.generation.advance()
    critic.module.zero_grad(set_to_none=True)
    expected = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for number, completion in enumerate(group.completions):
            now = plain_values(critic, group, number)[:-1]
            old, target = (
                torch.tensor(each, dtype=torch.float64) for each in (group.values[number], group.returns[number])
            )
            old = old[:-1]
            held = old + (now - old).clamp(-0.2, 0.2)
            error = torch.maximum((now - target).square(), (held - target).square())
            expected = expected + 0.5 * error.sum() / (len(groups) * len(group.completions) * len(completion.token_ids))
    expected.backward()
    wanted = {name: each.grad.clone() for name, each in critic.module.named_parameters() if each.grad is not None}
    critic.module.zero_grad(set_to_none=True)
    total, metrics = 0.0, Metrics()
    for batch in pack(groups, sequence_mean_weights, budget, with_kl=True):
        loss = critic_loss(critic, batch, settings, metrics)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), abs=1e-9)
    for name, each in critic.module.named_parameters():
        torch.testing.assert_close(each.grad, wanted[name], atol=1e-9, rtol=1e-7)
    assert metrics.reduce()["value/clipped"] > 0


def test_ppo_trains_policy_and_value_model(tiny_folder: str, tmp_path: Path) -> None:
    settings = recipe(
        tiny_folder, method__name="ppo", method__kl_coef=0.0, run__steps=40, optimizer__learning_rate=0.01,
        critic__learning_rate=0.01, critic__gamma=0.5, method__inner_updates=2,
    )  # fmt: skip
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    rewards = [line["reward/mean"] for line in result.metrics]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
    late = result.metrics[-5:]  # values start at 0 and approach the returns
    value, returned = (sum(line[name] for line in late) / 5 for name in ("value/mean", "value/return_mean"))
    assert returned > 0.35
    assert abs(value - returned) < returned / 2
    table = pq.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    row = table[0]
    assert row["values"] == [0.0] * (len(row["token_ids"]) + 1)  # the head starts at 0
    assert row["returns"][-1] == pytest.approx(row["reward"])
    later = range(len(row["token_ids"]))[::-1]  # γλ for each token until the reward
    assert row["advantages"] == pytest.approx([(0.5 * 0.95) ** place * row["reward"] for place in later])
    files = {path.name for path in (tmp_path / "run/checkpoints/step-000040").iterdir()}
    assert {"critic.weights.safetensors", "critic.optimizer.safetensors"} <= files


def test_a_critic_with_another_vocabulary_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    save_model(make_policy(vocab_size=50), tmp_path / "other")
    settings = recipe(tiny_folder, method__name="ppo", critic__name=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="has 50 tokens, and the policy 48"):
        train(settings, prompts=ROWS, out=tmp_path / "run")


def test_a_missing_critic_is_reported_with_its_field(tiny_folder: str, tmp_path: Path) -> None:
    settings = recipe(tiny_folder, method__name="ppo", critic__name="nowhere/model")
    with pytest.raises(UsageError, match=r"critic\.name = 'nowhere/model': there is no such folder"):
        train(settings, prompts=ROWS, out=tmp_path / "run")
    assert not (tmp_path / "run/recipe.toml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "ppo", "baseline": "group"}}, 'baseline = "group"'),
        ({"method": {"name": "ppo", "ratio": "sequence"}}, 'ratio = "sequence"'),
        ({"critic": {"gamma": 1.5}}, "critic.gamma = 1.5"),
        ({"critic": {"clip": -1.0}}, "critic.clip = -1.0"),
    ],
)
def test_incompatible_settings(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"model": {"name": "x"}, **changes})
