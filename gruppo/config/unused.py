"""Fields that have no effect in a recipe, because other fields leave nothing for them to do.

A value that differs from its default and changes nothing is a mistake of the user, so the recipe is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gruppo.config.methods import METHODS

if TYPE_CHECKING:
    from gruppo.config.recipe import Recipe
    from gruppo.config.sections import RewardModel


@dataclass(frozen=True)
class _Rule:
    """`fields` of a table ("*" for all) are unused where `applies`. `why`: the reason and the fix, with the recipe's
    values in braces."""

    table: str
    fields: str
    applies: Callable[[Recipe], bool]
    why: str


def _labels_nothing(recipe: Recipe) -> bool:
    return recipe.reward_model is None or not recipe.reward_model.prompts


def _threshold_unused(recipe: Recipe) -> bool:
    method = recipe.method
    compares = method.baseline == "indicator" or method.credit == "pair" or method.max_per_prompt
    return not compares and _labels_nothing(recipe)


def _offline(recipe: Recipe) -> bool:
    return recipe.method.source == "dataset"


def _samples_nothing(recipe: Recipe) -> bool:
    return _offline(recipe) and recipe.evaluation is None and not recipe.benchmarks


def _no_ratio(recipe: Recipe) -> bool:
    return recipe.method.surrogate == "log-likelihood"


def replays(settings: RewardModel) -> bool:
    """Whether a round of the reward model is to learn from earlier samples, too."""
    return settings.replay_fraction > 0


_RULES = (
    _Rule(
        "critic",
        "*",
        lambda recipe: not recipe.method.needs_critic,
        'method.credit = "{method.credit}" has no value model; remove it, or write method.name = "ppo"',
    ),
    _Rule(
        "method",
        "dpo_beta",
        lambda recipe: recipe.method.credit != "pair",
        'only credit = "pair" (DPO) uses it; remove it. The weight of the KL term is method.kl_coef',
    ),
    _Rule(
        "method",
        "kl_estimator kl_importance",
        lambda recipe: not recipe.method.kl_coef,
        "method.kl_coef = 0 leaves no KL term; remove it, or set method.kl_coef",
    ),
    _Rule(
        "method",
        "kl_importance",
        lambda recipe: recipe.method.kl_in_reward,
        'kl_estimator = "k1" leaves no KL term in the loss; remove it, or write kl_estimator = "k3"',
    ),
    _Rule(
        "method",
        "clip_low clip_high ratio old_logprobs",
        _no_ratio,
        'surrogate = "log-likelihood" has no probability ratio; remove it, or write surrogate = "clipped"',
    ),
    _Rule(
        "method",
        "advantage_epsilon",
        lambda recipe: recipe.method.scale == "none",
        'scale = "none" divides by no standard deviation; remove it',
    ),
    _Rule(
        "method",
        "success_threshold deduplicate max_per_prompt mask_truncated",
        _offline,
        'source = "dataset" trains on every completion of the dataset; remove it',
    ),
    _Rule(
        "method",
        "success_threshold",
        _threshold_unused,
        'only baseline = "indicator", credit = "pair", max_per_prompt and a trained [reward_model] use it; remove it',
    ),
    _Rule(
        "engine",
        "*",
        _samples_nothing,
        'method.source = "dataset" samples nothing, and there is no [evaluation]; remove it',
    ),
    _Rule(
        "cluster",
        "engines",
        _samples_nothing,
        'method.source = "dataset" samples nothing, and there is no [evaluation]; remove it',
    ),
    _Rule(
        "cluster",
        "engine_devices weights",
        lambda recipe: recipe.cluster is not None and not recipe.cluster.engines,
        "cluster.engines = 0 starts no engines; remove it, or set cluster.engines",
    ),
    _Rule(
        "cluster",
        "address",
        lambda recipe: recipe.cluster is not None and not recipe.cluster.uses_ray and recipe.cluster.trainers == 1,
        "cluster.trainers = 1, engines = 0 and reward_hosts = 0 start nothing; remove it, or set one of them",
    ),
    _Rule(
        "cluster",
        "reward_hosts",
        _offline,
        'method.source = "dataset" scores nothing; remove it',
    ),
    _Rule(
        "cluster",
        "shards",
        lambda recipe: recipe.cluster is not None and recipe.cluster.trainers == 1,
        "a single trainer holds all weights; remove it, or write more trainers",
    ),
    _Rule(
        "engine",
        "device",
        lambda recipe: recipe.cluster is not None and recipe.cluster.engines > 0,
        "Ray gives each of the cluster.engines a device; remove it",
    ),
    _Rule(
        "engine",
        "memory device",
        lambda recipe: not recipe.engine.has_own_process,
        'only engine.name = "vllm" uses it; remove it, or write name = "vllm"',
    ),
    _Rule(
        "sampling",
        "group_size stop",
        _offline,
        'method.source = "dataset" reads completions and samples none; remove it',
    ),
    _Rule("reward", "*", _offline, 'method.source = "dataset" scores nothing; remove it'),
    _Rule(
        "reward_model",
        "held_out learning_rate epochs batch_size replay_fraction replay_capacity seed continuations labels",
        lambda recipe: recipe.reward_model is not None and not recipe.reward_model.prompts,
        "prompts = 0 trains nothing; remove it, or set prompts",
    ),
    _Rule(
        "reward_model",
        "split continuations labels",
        lambda recipe: recipe.reward_model is not None and recipe.reward_model.kind == "outcome",
        'kind = "outcome" scores no steps; remove it, or write kind = "process"',
    ),
    _Rule(
        "reward_model",
        "replay_fraction replay_capacity",
        lambda recipe: recipe.run.iterations == 1 and recipe.reward_model is not None and replays(recipe.reward_model),
        "run.iterations = 1 has no earlier samples to replay; remove it, or write iterations = 2 or more",
    ),
    _Rule(
        "reward_model",
        "replay_capacity",
        lambda recipe: recipe.reward_model is not None and not replays(recipe.reward_model),
        "replay_fraction = 0 replays nothing; remove it",
    ),
)


def unused_fields(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Table, field and message of every field that has no effect in the recipe and is not at its default.

    The defaults of [method] are those of its row in METHODS.
    """
    for rule in _RULES:
        table = getattr(recipe, rule.table)
        if table is None or not rule.applies(recipe):
            continue
        for name in type(table).model_fields if rule.fields == "*" else rule.fields.split():
            value = getattr(table, name)
            if value != _default(recipe, table, name):
                written = json.dumps(value, ensure_ascii=False, default=str)
                why = rule.why.format(method=recipe.method)
                yield rule.table, name, f"{rule.table}.{name} = {written}: has no effect: {why}"


def _default(recipe: Recipe, table: Any, name: str) -> Any:
    row = METHODS[recipe.method.name].settings if table is recipe.method else {}
    return row.get(name, type(table).model_fields[name].get_default(call_default_factory=True))
