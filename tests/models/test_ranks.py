"""Methods that run on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gruppo.models.ranks import Alone, on_all_ranks
from gruppo.utils.signals import Interrupted, stop_on_signals


class Two(Alone):
    """Two ranks of which this is the leader. `announced`: the methods that the other one was told to run."""

    def __init__(self) -> None:
        self.size, self.announced = 2, list[str]()

    def announce(self, owner: object, method: str, arguments: Any) -> None:
        self.announced.append(method)


class Owner:
    def __init__(self) -> None:
        self.ranks = Two()

    @on_all_ranks
    def items(self, count: int) -> Iterator[int]:
        yield from range(count)


def test_a_stop_request_waits_until_all_items_of_all_ranks_are_taken() -> None:
    """Another rank would wait for this one in the exchange of the next item."""
    owner, taken = Owner(), list[int]()

    def take() -> None:
        with stop.interruptible():
            for item in owner.items(3):
                taken.append(item)
                if not stop.requested:
                    stop.request()

    with stop_on_signals() as stop, pytest.raises(Interrupted):
        take()
    assert taken == [0, 1, 2]


def test_items_are_announced_when_the_first_is_taken() -> None:
    owner = Owner()
    items = owner.items(2)
    assert owner.ranks.announced == []
    assert list(items) == [0, 1]
    assert owner.ranks.announced == ["items"]
