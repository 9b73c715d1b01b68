"""A run that starts again from its last checkpoint when it loses a rank."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config.recipe import Recipe
from gruppo.evaluation.datasets import Data
from gruppo.models.ranks import Ranks
from gruppo.rewards import RewardFunction
from gruppo.runs.results import Result
from gruppo.runs.trust import remember
from gruppo.training.callbacks import Callbacks
from gruppo.training.loop import run_training
from gruppo.training.lost_ranks import LostRanks, RankLostError
from gruppo.training.run import TrainingRun
from gruppo.training.setup import Local, prepare
from gruppo.utils.signals import Stop
from gruppo.utils.system import release_memory
from gruppo.utils.waiting import WaitWatcher, WatchedProgress


class Team(Protocol):
    """The ranks of a run, of which this process is the leader. `size`: how many the run should have."""

    @property
    def size(self) -> int: ...

    def joined(self) -> AbstractContextManager[tuple[Recipe, Ranks]]:
        """The ranks for the duration of the block, with the recipe for as many as there are. Raises RankLostError, also
        in the block's place, if one is lost and they can start again."""


@dataclass(frozen=True)
class FixedTeam:
    """Ranks that are there before the run begins, and end with it; or this process alone."""

    recipe: Recipe
    ranks: Ranks

    @property
    def size(self) -> int:
        """See `Team`."""
        return self.ranks.size

    @contextmanager
    def joined(self) -> Iterator[tuple[Recipe, Ranks]]:
        """See `Team`."""
        yield self.recipe, self.ranks


@dataclass(frozen=True)
class Attempt:
    """What all attempts of a run have in common. `rewards`: its functions. `model`, `local`: see `prepare`."""

    folder: Path
    rewards: Sequence[str | RewardFunction]
    data: Data
    progress: WatchedProgress
    watcher: WaitWatcher
    stop: Stop
    callbacks: Callbacks
    model: tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None
    local: Local | None

    def execute(self, team: Team, resume: bool, lost: LostRanks) -> Result:
        """Run until the end. Raises RankLostError if a rank is lost before that."""
        with ExitStack() as stack:
            with self.stop.interruptible():
                recipe, ranks = stack.enter_context(team.joined())
                parts = prepare(
                    recipe,
                    self.folder,
                    resume,
                    self.rewards,
                    self.data,
                    self.progress,
                    stack,
                    self.model,
                    local=self.local,
                    ranks=ranks,
                )
            parts.lost_ranks = lost
            remember(self.folder)  # also a resumed folder: this user chose its recipe
            run = TrainingRun(parts, self.progress, self.stop, self.callbacks.fresh())
            with self.watcher.telling(run.record_wait):
                summary = run.execute(run_training)
            return Result(parts.run.path, parts.run.metrics(), summary)


def run_attempts(attempt: Attempt, team: Team, resume: bool) -> Result:
    """Run until the end. When a rank is lost, all ranks end and start again, and the run continues from its last
    checkpoint as `--resume` does. Raises RunError if ranks are lost again and again."""
    lost = LostRanks(team.size)
    while True:
        try:
            return attempt.execute(team, resume or bool(lost.messages), lost)
        except RankLostError as error:
            lost.add(error, attempt.folder)
            attempt.progress.note(f"Note: {error.cause}; the ranks start again")
        gc.collect()  # the models of the attempt that has ended
        release_memory()
