"""Signs of life of ranks, and what the others say of one that is silent."""

from __future__ import annotations

import threading
from typing import NoReturn

import pytest

from gruppo.cluster import pulse
from gruppo.cluster.pulse import LATE, Pulse
from gruppo.utils.waiting import WaitWatcher


class Store:
    """A store in this process."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.texts: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        self.numbers[key] = self.numbers.get(key, 0) + amount
        return self.numbers[key]

    def set(self, key: str, value: str) -> None:
        self.texts[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.texts for key in keys)

    def get(self, key: str) -> bytes:
        return self.texts[key].encode()


class Ranks:
    """Three ranks whose time passes in `pass_time` alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(pulse, "time", self)
        self.store = Store()
        self.pulses = [Pulse(self.store, rank, 3) for rank in range(3)]
        self.beating = {0, 1, 2}
        self.pass_time(2)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_time(int(seconds))

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            for rank in sorted(self.beating):
                self.pulses[rank].beat()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_nobody_is_silent_as_long_as_all_beat(ranks: Ranks) -> None:
    ranks.pass_time(100)
    assert [one.silent(LATE) for one in ranks.pulses] == [[], [], []]
    assert ranks.pulses[0].account() == ""


def test_the_leader_names_a_rank_that_is_silent(ranks: Ranks) -> None:
    ranks.beating.remove(2)
    ranks.pass_time(3)
    assert ranks.pulses[0].silent(LATE) == []
    assert ranks.pulses[0].account().startswith("rank 2 has ended, or is silent since ")
    assert ranks.pulses[1].silent(0.5) == []  # it looks at the leader alone
    assert ranks.pulses[1].account() == ""


def test_the_leader_names_all_ranks_that_are_silent(ranks: Ranks) -> None:
    ranks.beating = {0}
    assert ranks.pulses[0].account().startswith("ranks 1, 2 have ended, or are silent since ")


def test_followers_notice_a_silent_leader_and_one_of_them_says_it(ranks: Ranks) -> None:
    ranks.beating.remove(0)
    assert ranks.pulses[1].account().startswith("rank 0 has ended, or is silent since ")
    assert [one.speaks for one in ranks.pulses] == [True, True, False]


def test_a_rank_that_fails_leaves_its_reason(ranks: Ranks) -> None:
    """Rank 1 ends because rank 2 did, and both are silent then."""
    ranks.pulses[2].leave("RunError: out of memory during updating")
    ranks.pulses[1].leave("")
    ranks.beating = {0}
    assert ranks.pulses[0].account() == "rank 2 has failed (RunError: out of memory during updating)"


def test_a_rank_that_only_notices_the_end_of_another_is_not_named(ranks: Ranks) -> None:
    ranks.pulses[1].leave("")
    ranks.beating = {0}
    assert ranks.pulses[0].account().startswith("rank 2 has ended")


def test_a_silent_rank_is_waited_for_and_a_follower_ends_when_patience_is_over() -> None:
    store, said, lost, told, ended = Store(), list[str](), list[str](), threading.Event(), threading.Event()

    def tell(text: str, over: bool) -> None:
        said.append(text)
        told.set()

    def end(words: str) -> None:
        lost.append(words)
        ended.set()

    follower = Pulse(store, 1, 2, every=0.01)
    watcher = WaitWatcher(tell, first=0.1)
    with watcher.running(every=0.01), follower.beating(patience=0.5, lost=end):
        assert told.wait(60)
        assert ended.wait(60)
    assert said[0].startswith("waiting for a sign of life from rank 0 since ")
    assert [words.split(" since ")[0] for words in lost] == ["rank 0 has ended, or is silent"]
    assert store.numbers["alive/1"] > 1


def test_a_store_that_is_gone_is_silence() -> None:
    class Gone(Store):
        def __getattribute__(self, name: str) -> NoReturn:
            raise RuntimeError("Connection reset by peer")

    follower = Pulse(Gone(), 1, 2, every=0.001)
    with pytest.raises(RuntimeError):
        follower.beat()
    assert follower.account().startswith("rank 0 has ended")
    follower.leave("any reason")
