"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Turn:
    """An environment's answer. `observation`: what the model reads next; several texts are a message each; None lets a
    model that has not ended its turn go on with it, and ends the completion of one that has. `done`: it is over, and
    nobody reads the observation. `calls`, `errors`: how many tools were called, and how many of these calls failed."""

    observation: str | Sequence[str] | None = None
    done: bool = False
    calls: int = 0
    errors: int = 0


class Environment(Protocol):
    """See the top of this file."""

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """Begin a completion. The completions of a group get one seed, so that they are given the same."""

    def step(self, text: str) -> Turn:
        """Answer to what the model wrote."""
