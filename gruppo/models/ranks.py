"""The processes that train a model together, as one of them sees it.

Every rank holds a shard of each model and runs the same methods of the same trainers on its share of the micro-batches.
Token weights are fixed over a whole minibatch before it is dealt out. So gradients and losses are sums over the ranks,
and neither the number of ranks nor the deal changes the objective. A single process is a rank that is `Alone`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gruppo.config.recipe import Recipe
from gruppo.models.policy import LanguageModel
from gruppo.models.value_head import ScalarModel
from gruppo.utils.metrics import Metrics
from gruppo.utils.signals import stop_held

Value = TypeVar("Value")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Loaded(NamedTuple):
    """The models of a run as they were loaded, before they are sharded: policy, value model and reward model."""

    policy: LanguageModel
    critic: ScalarModel | None = None
    scorer: ScalarModel | None = None


class Models(NamedTuple):
    """The models of a policy on this rank.

    `policy` is trained; `reference` is its frozen copy, if one is needed. `sampled` is what the engine samples from,
    and `initial` what an engine of the initial policy samples from.
    """

    policy: LanguageModel
    reference: LanguageModel | None
    sampled: LanguageModel
    initial: LanguageModel | None


class Ranks(Protocol):
    """The ranks of a run. `rank`: the number of this one, 0 for the leader. `size`: how many there are."""

    rank: int
    size: int

    def begin(self, recipe: Recipe, chosen: Mapping[str, Any], loaded: Loaded) -> None:
        """Let the other ranks take part in a run. `chosen`: settings that the leader chose. The models are described to
        them without weights, which `distribute` and `distribute_scalar` send. Only the leader calls this."""

    def announce(self, owner: object, method: str, arguments: Sequence[Any]) -> None:
        """Let the other ranks run this method of their `owner` too. Only the leader calls this."""

    def share(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """This rank's share of micro-batches with these numbers of tokens: the numbers of its own, and of those that it
        runs idle because other ranks have more. See `deal`."""

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks; the same on all of them."""

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients of the module's parameters so that their norm is at most `max_norm`.

        Returns the norm before that, which is the leader's on every rank.
        """

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor of which every rank holds a shard."""

    def distribute(self, policy: LanguageModel, reference: bool, initial: bool, apart: bool = False) -> Models:
        """Shard the policy, in place, and its reference if needed. `initial`: the initial policy is sampled from;
        `apart`: the engine samples while the policy is trained, so it needs a copy.

        Only the leader's policy has weights; the others get their shards from it.
        """

    def distribute_scalar(self, model: ScalarModel) -> ScalarModel:
        """Shard a value or reward model, in place, with the leader's weights."""


class Alone:
    """The only rank: a run in a single process."""

    rank, size = 0, 1

    def begin(self, recipe: Recipe, chosen: Mapping[str, Any], loaded: Loaded) -> None:
        """See `Ranks`."""

    def announce(self, owner: object, method: str, arguments: Sequence[Any]) -> None:
        """See `Ranks`."""

    def share(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """See `Ranks`."""
        return list(range(len(tokens))), []

    def gather(self, value: Value) -> list[Value]:
        """See `Ranks`."""
        return [value]

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """See `Ranks`."""
        return torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        return tensor

    def distribute(self, policy: LanguageModel, reference: bool, initial: bool, apart: bool = False) -> Models:
        """See `Ranks`."""
        frozen = policy.frozen_copy() if reference else None
        sampled = policy.sampling_copy() if apart else policy
        return Models(policy, frozen, sampled, frozen if initial else None)

    def distribute_scalar(self, model: ScalarModel) -> ScalarModel:
        """See `Ranks`."""
        return model


ALONE = Alone()


class _HasRanks(Protocol):
    @property
    def ranks(self) -> Ranks: ...


Owner = TypeVar("Owner", bound=_HasRanks)


def on_all_ranks(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Let a method that the leader calls run on every rank, with the same arguments.

    Such a method calls no other one. Its arguments are positional. With several ranks, it is not interrupted. A method
    that yields begins on all ranks when the leader takes its first item, and the leader must take them all.
    """

    @functools.wraps(method)
    def announced(owner: Owner, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        assert not named, "arguments of a method on all ranks are positional"
        if owner.ranks.size == 1:
            return method(owner, *arguments, **named)
        if inspect.isgeneratorfunction(method):
            return _announced_items(owner, method, arguments)  # type: ignore[no-any-return]
        with stop_held():
            owner.ranks.announce(owner, method.__name__, arguments)
            return method(owner, *arguments, **named)

    return announced


def _announced_items(owner: _HasRanks, method: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    with stop_held():
        owner.ranks.announce(owner, method.__name__, arguments)
        yield from method(owner, *arguments)


def deal(tokens: Sequence[int], rank: int, size: int) -> tuple[list[int], list[int]]:
    """Deal micro-batches to ranks, the longest first and back and forth, so that their loads are alike.

    Every rank must run the same number of them, or the others would wait for it forever. A rank that has one less than
    others runs the smallest micro-batch idle. Returns the numbers of this rank's own, in order, and of its idle one.
    """
    order = sorted(range(len(tokens)), key=lambda place: (-tokens[place], place))
    rows = [order[start : start + size] for start in range(0, len(order), size)]
    own = []
    for number, row in enumerate(rows):
        place = rank if number % 2 == 0 else size - 1 - rank
        own += row[place : place + 1]
    return sorted(own), order[-1:] * (len(rows) - len(own))


@contextmanager
def metrics_of_all(ranks: Ranks, metrics: Metrics) -> Iterator[Metrics]:
    """Metrics for this rank's observations inside the block; at its end those of all ranks are added to `metrics`."""
    if ranks.size == 1:
        yield metrics
        return
    own = Metrics()
    yield own
    for observations in ranks.gather(own.observations()):
        metrics.add(observations)
