"""The ranks of a run as processes of torch.distributed.

The leader, rank 0, has the whole run: prompts, engine, rewards, run folder. The other ranks are followers: they hold
shards of the models, and run what the leader announces. Two groups carry this. In one, followers wait for the next
announcement, as long as the leader lives (see `gruppo.cluster.pulse`). In the other, ranks exchange numbers while they
work, and nobody waits longer than the recipe's patience. An exchange fails on all ranks as soon as one of them ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gruppo.cluster.sending import bare, receive_weights, send_weights
from gruppo.cluster.sharding import gradient_norm, scale_gradients, shard_policy, shard_scalar, whole
from gruppo.config.recipe import Recipe
from gruppo.models.blueprint import described
from gruppo.models.lora import AdaptedModel
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import Loaded, Models, deal
from gruppo.models.value_head import ScalarModel
from gruppo.rollout.source import Step
from gruppo.training.policy_trainer import StepBatches
from gruppo.utils.waiting import waiting_for

Value = TypeVar("Value")
FOREVER = timedelta(days=365)


class Begin(NamedTuple):
    """The first announcement: the recipe of the run, the settings that the leader chose for it, and what `described`
    says of its policy, value model and reward model."""

    recipe: Recipe
    chosen: Mapping[str, Any]
    models: bytes


class Call(NamedTuple):
    """A method that all ranks run: the class of its owner, its name, and its arguments, encoded."""

    owner: str
    method: str
    arguments: list[Any]


class StepOf(NamedTuple):
    """Stands for a step in arguments. Every rank has its own."""

    number: int
    cursor: int


class MinibatchOf(NamedTuple):
    """Stands for a minibatch of the current step in arguments. Every rank has packed its own share of it."""

    number: int


class LeadersOwn(NamedTuple):
    """Stands for a function in arguments that only the leader has: one that refuses values that are not finite."""


@dataclass
class ProcessRanks:
    """See `Ranks`.

    `group`: the processes, for numbers and objects on the host. `announcements`: the same, for the leader's
    announcements. `mesh`: the same, for weights.
    """

    group: dist.ProcessGroup
    announcements: dist.ProcessGroup
    mesh: DeviceMesh

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def begin(self, recipe: Recipe, chosen: Mapping[str, Any], loaded: Loaded) -> None:
        """See `Ranks`."""
        policy, critic, scorer = loaded
        models = Loaded(replace(policy, body=None), critic and bare(critic), scorer and bare(scorer))
        self._send(Begin(recipe, dict(chosen), described(models)))

    def announce(self, owner: object, method: str, arguments: Sequence[Any]) -> None:
        """See `Ranks`."""
        self._send(Call(type(owner).__name__, method, [_encoded(argument) for argument in arguments]))

    def end(self) -> None:
        """Let the followers end. Only the leader calls this."""
        self._send(None)

    def _send(self, message: object) -> None:
        with waiting_for("the other ranks"):
            dist.broadcast_object_list([message], group=self.announcements, group_src=0)

    def hear(self) -> Begin | Call | None:
        """The leader's next announcement; None at the end. Only followers call this."""
        messages: list[Any] = [None]
        dist.broadcast_object_list(messages, group=self.announcements, group_src=0)
        heard: Begin | Call | None = messages[0]
        return heard

    def share(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """See `Ranks`."""
        return deal(tokens, self.rank, self.size)

    def gather(self, value: Value) -> list[Value]:
        """See `Ranks`."""
        values: list[Any] = [None] * self.size
        with waiting_for("the other ranks"):
            dist.all_gather_object(values, value, self.group)
        return values

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """See `Ranks`. The leader's norm counts: rounding may differ between ranks."""
        norm = gradient_norm(module)
        agreed = self.gather(float(norm))[0]
        scale_gradients(module, agreed, max_norm)
        return torch.full_like(norm, agreed)

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        return whole(tensor)

    def distribute(self, policy: LanguageModel, reference: bool, initial: bool, apart: bool = False) -> Models:
        """See `Ranks`. Only the leader samples, from copies of its own."""
        leads = self.rank == 0
        sampled = policy.sampling_copy() if leads else policy
        start = policy.sampling_copy() if leads and initial else None
        frozen = None
        if reference and not isinstance(policy, AdaptedModel):
            # The fused decoder of a copy would free the weights that are to be sharded.
            frozen = self._shard_policy(replace(policy, body=None).frozen_copy())
        sharded = self._shard_policy(policy)
        if reference and isinstance(policy, AdaptedModel):
            frozen = sharded.frozen_copy()
        return Models(sharded, frozen, sampled, start)

    def distribute_scalar(self, model: ScalarModel) -> ScalarModel:
        """See `Ranks`."""
        if self.rank == 0:
            send_weights(model.module, self.group)
            return shard_scalar(model, self.mesh)
        sharded = shard_scalar(model, self.mesh)
        receive_weights(sharded.module, sharded.policy.device, self.group)
        return sharded

    def _shard_policy(self, policy: LanguageModel) -> LanguageModel:
        if self.rank == 0:
            send_weights(policy.scorer, self.group)
            return shard_policy(policy, self.mesh)
        sharded = shard_policy(policy, self.mesh)
        receive_weights(sharded.scorer, sharded.device, self.group)
        return sharded


def _encoded(argument: Any) -> Any:
    """An argument of a method as it is sent."""
    if isinstance(argument, Step):
        return StepOf(argument.number, argument.cursor)
    if isinstance(argument, StepBatches):
        return MinibatchOf(argument.number)
    if isinstance(argument, list) and argument and isinstance(argument[0], StepBatches):
        return [MinibatchOf(minibatch.number) for minibatch in argument]
    return LeadersOwn() if callable(argument) else argument
