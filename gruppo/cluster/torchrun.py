"""Ranks that torchrun, or another launcher with its environment variables, has started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from gruppo.config.recipe import Recipe
from gruppo.errors import RunError, UsageError

if TYPE_CHECKING:
    from gruppo.cluster.ranks import ProcessRanks


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started several processes, or this one as one rank."""
    return "RANK" in environment or int(environment.get("WORLD_SIZE", "1")) > 1


def own_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process, 0 if no launcher has started ranks."""
    return int(environment.get("RANK", "0")) if "WORLD_SIZE" in environment else 0


def check_launch(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError if a launcher has started processes, and not as many as the recipe has ranks."""
    started = int(environment.get("WORLD_SIZE", "1"))
    wanted = 1 if recipe.cluster is None else recipe.cluster.trainers
    if not is_launched(environment) or started == wanted:
        return
    if recipe.cluster is None:
        raise UsageError(
            f"WORLD_SIZE = {started}: {started} processes were started, and the recipe has no [cluster]; add "
            f"`--set cluster.trainers={started}`, or start one process"
        )
    raise UsageError(
        f"cluster.trainers = {wanted}: WORLD_SIZE = {started}, so {started} processes were started; make the two equal"
    )


@contextmanager
def joined_launched(recipe: Recipe) -> Iterator[ProcessRanks]:
    """The ranks that a launcher has started. See `gruppo.cluster.joining.joined`. Raises RunError if one is lost."""
    from torch.distributed.rendezvous import rendezvous

    from gruppo.cluster.joining import Rendezvous, joined
    from gruppo.training.lost_ranks import RankLostError

    assert recipe.cluster is not None
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=recipe.cluster.patience)))
    meeting = Rendezvous(rank, size, store, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        with joined(recipe, meeting) as ranks:
            yield ranks
    except RankLostError as error:
        raise RunError(f"{error}; more is in the output of that rank; resume with --resume") from error
