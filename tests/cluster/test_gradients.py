"""The gradient does not depend on the number of ranks, for any method."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained, select
from gruppo.cluster.ranks import ProcessRanks
from gruppo.config.loading import load_recipe, without_unused_fields
from gruppo.config.methods import METHODS
from gruppo.models.lora import add_adapters
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import ALONE, Ranks, deal
from gruppo.models.value_head import ScalarModel
from gruppo.rollout.source import Step
from gruppo.training.optimizer import Trainable
from gruppo.training.policy_trainer import PolicyTrainer
from gruppo.training.value_model import ValueModelTrainer
from gruppo.types import Group, Reward, Steps
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import NullProgress
from tests.cluster.team import Team, Together, started
from tests.conftest import make_policy, random_groups


class Recording(torch.optim.SGD):
    """Gradient descent that keeps the gradients of every step."""

    def __init__(self, module: torch.nn.Module, computed_by: LanguageModel, ranks: Ranks) -> None:
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        super().__init__([weight for _, weight in named], lr=0.0)
        self.named, self.ranks, self.seen = named, ranks, []
        self.register_step_post_hook(lambda *_: computed_by.generation.advance())

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.seen.append({name: self.ranks.whole(weight.grad).clone() for name, weight in self.named})
        super().step()


class Guard:
    def require(self, value: float, what: str, *_: Any) -> None:
        assert math.isfinite(value), f"{what} is {value}"


def scored_groups(seed: int) -> list[Group]:
    """Groups of 0 and 1 as rewards, with rewards of their steps; one group is much longer than the others."""
    source = random.Random(seed)
    groups = [*random_groups(seed, 4, 4), *random_groups(seed + 1, 1, 9)]
    for group in groups:
        group.rewards = [
            Reward(float(number % 2), {}, steps={"f": Steps((source.random(), 1.0), (0, len(one.token_ids) - 1))})
            if len(one.token_ids) > 1
            else Reward(float(number % 2), {})
            for number, one in enumerate(group.completions)
        ]
    return groups


def trained(ranks: Ranks, method: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Gradients, losses, log-probabilities and metrics of two steps of a method."""
    if isinstance(ranks, ProcessRanks):
        ranks = Together.of(ranks)
    repeats = METHODS[method].settings.get("surrogate") != "log-likelihood"
    settings: dict[str, Any] = {
        "model": {"name": "x", "dtype": "float64", "lora": changes.pop("lora", None)},
        "run": {"steps": 2, "noise_every": 1},
        "method": {"name": method, **changes.pop("method", {"inner_updates": 2} if repeats else {})},
        "optimizer": {"learning_rate": 0.5, "max_grad_norm": 0.1},
        "sampling": {"prompts_per_step": 5, "max_tokens": 8, "temperature": 0.7},
    }
    settings["model"] = {name: value for name, value in settings["model"].items() if value is not None}
    if method != "sft":
        settings["reward"] = {"functions": ["numeric_answer"]}
    recipe = load_recipe(without_unused_fields(settings))
    policy = make_policy(torch.float64, tie_word_embeddings=changes.pop("tied", True), num_hidden_layers=2)
    policy = add_adapters(policy, recipe.model.lora, 0)
    policy = replace(policy, recompute=changes.pop("recompute", False))
    steps = changes.pop("steps", 2)
    assert not changes
    critic = ScalarModel.on(make_policy(torch.float64, seed=1)) if recipe.method.needs_critic else None
    models = ranks.distribute(policy, recipe.method.needs_reference, False)
    sizes, guard = BatchSizes(30, 4), Guard()
    optimizer = Recording(models.policy.model, models.policy, ranks)
    trainer = PolicyTrainer(
        models.policy, models.reference, optimizer, recipe, sizes, guard, NullProgress(), ranks  # type: ignore[arg-type]
    )  # fmt: skip
    optimizers, part = [optimizer], None
    if critic is not None:
        critic = ranks.distribute_scalar(critic)
        optimizers.append(Recording(critic.module, critic.policy, ranks))
        part = Trainable(critic, optimizers[1])
    value_model = ValueModelTrainer(part, recipe, sizes, guard, NullProgress(), ranks)  # type: ignore[arg-type]
    result: dict[str, Any] = {"metrics": [], "logprobs": [], "batches": []}
    for number in range(1, steps + 1):
        step, groups = Step(number, 0), scored_groups(number)
        mark_trained(groups, False)
        select(groups, recipe.method)
        trainer.score(groups, step)
        value_model.score(groups, step)
        assign_advantages(groups, recipe.method, step.metrics, {}, recipe.critic)
        minibatches = trainer.pack(groups, step)
        for _ in range(recipe.method.inner_updates):
            for minibatch in minibatches:
                trainer.update(minibatch, 0, step)
                value_model.update(minibatch, trainer.rate(step), 0, step)
        trainer.keep_logprobs(minibatches)
        result["metrics"].append(step.metrics.reduce())
        result["logprobs"].append([[group.old_logprobs, group.ref_logprobs, group.entropy] for group in groups])
        result["batches"] += [len(minibatch.batches) for minibatch in minibatches]
    result["gradients"] = [seen for one in optimizers for seen in one.seen]
    result["weights"] = dict(trainer.whole_weights())
    return result


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Equal within 1e-12 of the largest value of a tensor, or of a list of numbers."""
    if expected is None:
        assert found is None, where
    elif isinstance(expected, Tensor):
        scale = max(1e-6, float(expected.abs().max()))
        assert found.shape == expected.shape, where
        assert float((found - expected).abs().max()) <= 1e-12 * scale, where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_equal(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}[{place}]")
    else:
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-12), where


def compare(team: Team, size: int, name: str, replicas: int = 1, **changes: Any) -> None:
    alone = trained(ALONE, name, dict(changes))
    assert len(alone["gradients"]) >= 2
    assert any(bool(tensor.any()) for tensor in alone["gradients"][0].values())
    together = team.run(size, trained, name, dict(changes), replicas=replicas)
    counts = alone.pop("batches")
    assert [one.pop("batches") for one in together] == [[-(-count // size) for count in counts]] * size
    for one in together:
        assert_equal(one["gradients"], alone["gradients"], "gradients")
        assert_equal(one["weights"], alone["weights"], "weights")
        assert_equal(one["logprobs"], alone["logprobs"], "logprobs")
    assert_equal(together[0]["metrics"], alone["metrics"], "metrics")


# The others differ in their data and advantages, not in what the ranks compute.
FEW = {"grpo", "ppo", "dpo", "gspo"}


def some(values: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """Parameters, of which only those that are kept run in `make test`."""
    return [pytest.param(value, marks=() if kept(value) else pytest.mark.cluster, id=str(value)) for value in values]


@pytest.mark.parametrize("method", some(METHODS, lambda method: method in FEW))
def test_every_method_has_the_gradient_of_one_process(team: Team, method: str) -> None:
    compare(team, 2, method)


ARRANGEMENTS = [
    {"size": 1},
    {"size": 3},
    {"size": 3, "method": {"minibatches": 2, "inner_updates": 2, "kl_coef": 0.1}},
    {"size": 3, "tied": False, "recompute": True},
    {"size": 2, "lora": {"rank": 2}},
    {"size": 3, "lora": {"rank": 2}, "recompute": True, "method": {"kl_coef": 0.1, "inner_updates": 2}},
    {"size": 2, "steps": 30},  # no weight that was prepared for an earlier step is used again
]


@pytest.mark.parametrize("changes", some(ARRANGEMENTS, lambda changes: "method" in changes))
def test_every_arrangement_has_the_gradient_of_one_process(team: Team, changes: dict[str, Any]) -> None:
    compare(team, name="grpo", **changes)


@pytest.mark.cluster
def test_copies_of_shards_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    with started(4, tmp_path) as team:
        compare(team, 4, "grpo", replicas=2)
        compare(team, 4, "ppo", replicas=2)


def test_the_deal_is_fair_and_complete() -> None:
    source = random.Random(0)
    for size in range(1, 6):
        for count in range(12):
            tokens = [source.randrange(1, 100) for _ in range(count)]
            hands = [deal(tokens, rank, size) for rank in range(size)]
            assert sorted(place for own, _ in hands for place in own) == list(range(count))
            assert {len(own) + len(idle) for own, idle in hands} == {-(-count // size)}
            assert all(len(idle) <= 1 for _, idle in hands)
            loads = [sum(tokens[place] for place in own) for own, _ in hands]
            assert max(loads) - min(loads) <= max(tokens, default=0)
