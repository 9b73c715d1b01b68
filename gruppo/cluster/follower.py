"""A follower: a rank that holds shards of the models, and runs what the leader announces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from gruppo.cluster.ranks import Begin, Call, LeadersOwn, MinibatchOf, ProcessRanks, StepOf
from gruppo.models.loading import find_like, find_model, load_model
from gruppo.models.lora import add_adapters
from gruppo.models.packing import Batch
from gruppo.rollout.source import Step
from gruppo.training.models import chosen_policy, distribute, load_critic, load_scorer
from gruppo.training.policy_trainer import StepBatches
from gruppo.training.trainers import Trainers, make_trainers
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import NullProgress


class AbandonedError(Exception):
    """Ends a method that the leader ends with an error, for the same reason."""


class _LeaderTells:
    """In place of a `FiniteGuard`: all ranks have the same numbers, and the leader reports what is wrong with them."""

    def require(
        self, value: float, what: str, batches: Sequence[Batch], update: int = 0, field: str = "optimizer.learning_rate"
    ) -> None:
        raise AbandonedError


def follow(ranks: ProcessRanks) -> None:
    """Take part in the leader's run until it ends."""
    message = ranks.hear()
    if message is None:  # the leader has refused the recipe
        return
    assert isinstance(message, Begin)
    follower = Follower(load_trainers(message, ranks))
    while (message := ranks.hear()) is not None:
        assert isinstance(message, Call)
        follower.run(message)


def load_trainers(begin: Begin, ranks: ProcessRanks) -> Trainers:
    """Load and shard the models of a run, as the leader does."""
    recipe, chosen, progress = begin.recipe, begin.chosen, NullProgress()
    torch.set_num_threads(chosen["threads"])
    source = find_model(recipe.model.name, progress, trust_remote_code=recipe.model.trust_remote_code)
    attention = chosen.get("attention", recipe.model.attention)
    loaded = load_model(source, chosen["device"], chosen["dtype"], progress, attention)
    policy = chosen_policy(add_adapters(loaded, recipe.model.lora, recipe.run.seed), recipe, chosen)
    critic = scorer = None
    if recipe.method.needs_critic:
        found = find_like(recipe.critic.name, "critic.name", source, progress)
        critic = load_critic(recipe, found, policy, chosen["dtype"], progress)
    if recipe.reward_model is not None:
        found = find_like(recipe.reward_model.name, "reward_model.name", source, progress)
        scorer = load_scorer(recipe, found, policy, chosen["dtype"], progress)
    models = distribute(recipe, policy, critic, scorer, ranks)
    sizes = BatchSizes(chosen["micro_batch_tokens"], chosen["slots"], retries=False)
    return make_trainers(recipe, models, sizes, _LeaderTells(), progress, ranks)


class Follower:
    """Runs methods of its trainers."""

    def __init__(self, trainers: Trainers) -> None:
        parts = (trainers.policy, trainers.value_model, trainers.scorer, trainers.reward_model, trainers.files)
        self.owners = {type(part).__name__: part for part in parts}
        self.minibatches: dict[int, StepBatches] = {}

    def run(self, call: Call) -> None:
        """Run a method to its end. What it returns is the leader's too, and is dropped."""
        owner = self.owners[call.owner]
        method = getattr(type(owner), call.method).__wrapped__
        try:
            result = method(owner, *map(self._decoded, call.arguments))
            if isinstance(result, Iterator):
                for _ in result:
                    pass
        except AbandonedError:
            return
        if call.method == "pack":
            self.minibatches = {minibatch.number: minibatch for minibatch in result}

    def _decoded(self, argument: Any) -> Any:
        if isinstance(argument, StepOf):
            return Step(*argument)
        if isinstance(argument, MinibatchOf):
            return self.minibatches[argument.number]
        if isinstance(argument, LeadersOwn):
            return _abandon
        return [self._decoded(item) for item in argument] if isinstance(argument, list) else argument


def _abandon(*_: object) -> NoReturn:
    raise AbandonedError
