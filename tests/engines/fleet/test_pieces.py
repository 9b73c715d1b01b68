"""How requests are cut into pieces. Needs no Ray."""

from __future__ import annotations

import random

import pytest

from gruppo.engines.base import Request
from gruppo.engines.fleet.pieces import cut, pieces_of


@pytest.mark.parametrize(
    ("loads", "slots", "engines", "sizes"),
    [
        ([8] * 16, 64, 2, [8, 8]),  # everything fits: one piece for each engine
        ([8] * 5, 64, 2, [2, 3]),  # whole groups alone
        ([8] * 4, 16, 2, [2, 2]),
        ([8] * 16, 16, 2, [2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]),  # several rounds: smaller pieces at the end
        ([8] * 3, 4, 2, [1, 1, 1]),  # a group is larger than the slots
        ([1, 30, 1, 1], 64, 4, [1, 1, 1, 1]),
        ([], 8, 2, []),
    ],
)
def test_sizes(loads: list[int], slots: int, engines: int, sizes: list[int]) -> None:
    assert [len(piece) for piece in cut(loads, slots, engines)] == sizes


def test_every_request_is_in_one_piece_in_order_and_no_piece_has_more_than_the_slots() -> None:
    generator = random.Random(0)
    for _ in range(500):
        loads = [generator.randint(1, 20) for _ in range(generator.randint(0, 60))]
        slots, engines = generator.randint(1, 100), generator.randint(1, 9)
        pieces = cut(loads, slots, engines)
        assert [place for piece in pieces for place in piece] == list(range(len(loads)))
        for piece in pieces:
            assert len(piece) == 1 or sum(loads[place] for place in piece) <= slots


def test_requests_without_streams_are_in_no_piece() -> None:
    requests = [Request((1,), []), Request((2,), [(0,)]), Request((3,), []), Request((4,), [(1,), (2,)])]
    (one, two) = pieces_of(requests, 8, 2)
    assert (one.places, two.places) == ((1,), (3,))
    assert two.requests == (requests[3],)


def test_an_engine_keeps_nothing_for_requests_that_another_one_may_get() -> None:
    (piece,) = pieces_of([Request((1, 2), [(0,)], shared=1, keep=True)], 8, 2)
    assert piece.requests == (Request((1, 2), [(0,)], shared=1),)
