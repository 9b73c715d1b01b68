"""A follower: a rank that holds shards of the models, and runs what the leader announces."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from gruppo.cluster.ranks import Begin, Call, LeadersOwn, MinibatchOf, ProcessRanks, StepOf
from gruppo.errors import RunError
from gruppo.models.loading import find_model
from gruppo.models.lora import skeleton
from gruppo.models.packing import Batch
from gruppo.rollout.source import Step
from gruppo.training.models import distribute
from gruppo.training.policy_trainer import StepBatches
from gruppo.training.trainers import Trainers, make_trainers
from gruppo.utils.oom_retry import BatchSizes, SizeReduced
from gruppo.utils.progress import NullProgress
from gruppo.utils.system import keep_freed_memory
from gruppo.utils.waiting import WaitWatcher


class AbandonedError(Exception):
    """Ends a method that the leader ends with an error, for the same reason."""


def require_finite(value: float, what: str, batches: Sequence[Batch], *_: object) -> None:
    """Abandon the leader's method if a value is not finite. All ranks have the same one, and the leader reports it."""
    if not math.isfinite(value):
        raise AbandonedError


class _LeaderTells:
    """In place of a `FiniteGuard`."""

    require = staticmethod(require_finite)


def follow(ranks: ProcessRanks) -> None:
    """Take part in the leader's run until it ends. What this rank waits for is said on standard error."""

    def tell(text: str, over: bool) -> None:
        sys.stderr.write(f"gruppo: rank {ranks.rank}: {text}\n")

    with WaitWatcher(tell).running():
        message = ranks.hear()
        if message is None:  # the leader has refused the recipe
            return
        assert isinstance(message, Begin)
        follower = Follower(load_trainers(message, ranks))
        while (message := ranks.hear()) is not None:
            assert isinstance(message, Call)
            follower.run(message)


def load_trainers(begin: Begin, ranks: ProcessRanks) -> Trainers:
    """Shard the models of a run as the leader does, with the weights that it sends."""
    recipe, chosen = begin.recipe, begin.chosen
    torch.set_num_threads(chosen["threads"])
    keep_freed_memory()
    if recipe.model.trust_remote_code:  # the classes of the model are known once its own files have been imported
        skeleton(find_model(recipe.model.name, trust_remote_code=True).config, True)
    models = distribute(recipe, pickle.loads(begin.models), ranks)

    def reduced(what: SizeReduced) -> NoReturn:
        raise RunError(
            f"rank {ranks.rank}: out of memory during {what.during} ({what.why}); lower run.memory, and resume with "
            "--resume"
        )

    sizes = BatchSizes(chosen["micro_batch_tokens"], chosen["slots"], on_reduced=reduced)
    return make_trainers(recipe, models, sizes, _LeaderTells(), NullProgress(), ranks)


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
            return require_finite
        return [self._decoded(item) for item in argument] if isinstance(argument, list) else argument
