"""The protocol of environments. No torch: user-defined objects live in worker processes.

An environment is an object with

    reset(row, seed) -> str | None     text that is appended to the prompt; `row`: the prompt and the other columns
    step(text) -> Turn                 answer to what the model has written since the last observation
    get_reward() -> float | None       optional: reward of the finished completion
    stop = ("\\n",)                     optional, on the class: stop strings that end a turn, as does the EOS token

Objects written for TRL's `environment_factory` work too; see `gruppo.rollout.environments.trl_tools`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Turn:
    """An environment's answer to a turn.

    `observation`: what the model reads next; each of several texts becomes a message. None ends the completion if the
    model has ended its turn; otherwise the turn continues. `done`: the completion is finished, and the observation is
    not used. `calls`, `errors`: number of tool calls, and how many of them failed.
    """

    observation: str | Sequence[str] | None = None
    done: bool = False
    calls: int = 0
    errors: int = 0


class Environment(Protocol):
    """See the module docstring."""

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Start a completion. All completions of a group get the same seed, so that they face the same task."""

    def step(self, text: str) -> Turn:
        """Answer what the model wrote."""
