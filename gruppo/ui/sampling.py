"""Which steps, groups and questions of a large run are in a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gruppo.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """The most that a report holds of each run.

    `steps`: with their groups, and evaluations with their questions. `groups`: of each of these steps, token by token.
    `questions`: through time. `megabytes`: of tokens in the file, shared by its runs; 1 MB is 10^6 bytes. Raises
    UsageError for a limit below 1.
    """

    steps: int = 12
    groups: int = 8
    questions: int = 40
    megabytes: float = 20.0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("groups", self.groups), ("questions", self.questions)):
            if value < 1:
                raise UsageError(f"--{name} {value}: must be 1 or more")
        if not 0 < self.megabytes <= 2_000:
            raise UsageError(f"--megabytes {self.megabytes:g}: must be more than 0, and 2000 at most")


def spread(count: int, most: int, kept: Sequence[int] = ()) -> list[int]:
    """At most `most` of the places 0 … count - 1, in order: `kept`, the first, the last, and others evenly spaced.

    If `most` is too small for the named ones, the earlier of last, first and `kept` are chosen.
    """
    if count <= most:
        return list(range(count))
    named = list(dict.fromkeys([count - 1, 0, *kept]))[:most]
    for others in range(most, 1, -1):
        chosen = {*named, *(round(place) for place in np.linspace(0, count - 1, others).tolist())}
        if len(chosen) <= most:
            return sorted(chosen)
    return sorted(named)


def by_weight(places: Sequence[int], first: Sequence[int]) -> list[int]:
    """The places in the order in which they are wanted if not all fit: those in `first`, then the others, each as far
    as possible from those before it."""
    wanted = [place for place in dict.fromkeys(first) if place in places]
    rest = [place for place in places if place not in wanted]
    while rest:
        farthest = max(rest, key=lambda place: (min((abs(place - one) for one in wanted), default=0), -place))
        wanted.append(farthest)
        rest.remove(farthest)
    return wanted
