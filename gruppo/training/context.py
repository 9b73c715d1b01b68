"""The context that all parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from gruppo.config.recipe import Recipe
from gruppo.runs.folder import RunFolder
from gruppo.runs.recorder import Recorder
from gruppo.training.callbacks import Callbacks
from gruppo.training.checkpoint import State
from gruppo.utils.signals import Stop


@dataclass(frozen=True)
class RunContext:
    """The recipe, folder and state of a run, and what it reports to. The state is modified in place."""

    recipe: Recipe
    folder: RunFolder
    state: State
    recorder: Recorder
    stop: Stop
    callbacks: Callbacks

    @property
    def at_end(self) -> bool:
        """Whether every step is done, or a callback has asked to stop."""
        return self.state.step == self.recipe.run.steps or self.callbacks.stopped
