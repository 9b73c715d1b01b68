"""Pieces: the requests of a call, cut into parts that one engine samples at a time.

The cut depends on the requests, the slots and the number of engines alone, never on which engine is free or alive. So a
piece that is sampled again, by any engine, has the same completions to the last bit. For the same reason an engine
keeps nothing for later requests: another engine may get them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gruppo.engines.base import Request


@dataclass
class Piece:
    """Some requests of a call, by their places in it. `told`: tokens of it that the caller knows of. `given`: its
    requests whose completions the caller has."""

    places: tuple[int, ...]
    requests: tuple[Request, ...]
    told: int = 0
    given: set[int] = field(default_factory=set)


def cut(loads: Sequence[int], slots: int, engines: int) -> list[tuple[int, ...]]:
    """Cut requests with these numbers of completions into pieces of whole requests, by their places.

    While more completions are left than all engines have slots, a piece fills the slots of an engine; it then becomes
    smaller, down to a quarter of the slots, so that engines finish at about the same time. If everything fits into the
    slots of all engines, each gets one piece: pieces that are smaller than they need to be waste slots.
    """
    pieces: list[tuple[int, ...]] = []
    left, place = sum(loads), 0
    rounds = left > slots * engines
    while place < len(loads):
        if rounds:
            size = min(slots, max(-(-left // (2 * engines)), -(-slots // 4)))
        else:
            size = -(-left // max(1, engines - len(pieces)))
        first, taken = place, loads[place]
        place += 1
        while place < len(loads) and _fits(taken, loads[place], size, size if rounds else slots):
            taken += loads[place]
            place += 1
        left -= taken
        pieces.append(tuple(range(first, place)))
    return pieces


def _fits(taken: int, load: int, size: int, most: int) -> bool:
    """Whether a piece with one more request is nearer to its size, and not too large."""
    return taken + load <= most and abs(taken + load - size) < abs(taken - size)


def pieces_of(requests: Sequence[Request], slots: int, engines: int) -> list[Piece]:
    """The pieces of a call. Requests without streams are in none."""
    sampled = [place for place, request in enumerate(requests) if request.streams]
    parts = cut([len(requests[place].streams) for place in sampled], slots, engines)
    places = [tuple(sampled[index] for index in part) for part in parts]
    return [Piece(part, tuple(replace(requests[place], keep=False) for place in part)) for part in places]
