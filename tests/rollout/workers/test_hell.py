"""Hostile rewards: the failing call excludes its completions, the next call is correct, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import psutil
import pytest

from gruppo.errors import UsageError
from gruppo.rollout.workers.channel import Channel
from gruppo.rollout.workers.log import MOST_BYTES, LogFile, Output, old_log
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Reward
from tests.rollout.workers.test_rewards import group, score, totals

HELL = "tests.rollout.workers.hell"


def scored(
    name: str, *texts: str, timeout: float = 60.0, memory: int = 0, log: Path | None = None, **columns: object
) -> list[list[Reward]]:
    """Rewards of groups of one completion, scored one after another in one process."""
    with RewardPool([f"{HELL}:{name}"], [], list(columns), timeout=timeout, workers=1, memory=memory, log=log) as pool:
        return [pool.score([group(text, **columns)], {})[0][0] for text in texts]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("holds_the_lock", "reward.timeout"),
        ("huge_power", "reward.timeout"),
        ("awaits_for_ever", "reward.timeout"),
        ("stops_itself", "reward.timeout"),
        ("reads_null", "SIGSEGV"),
        ("fills_the_memory", "MemoryError"),
        ("closes_everything", "died"),
        ("writes_everywhere", "something other than an answer"),
        ("recursion", "RecursionError"),
        ("cancels", "CancelledError"),
        ("unprintable_error", "OddError: <OddError that cannot be printed>"),
        ("logs_too_much", "more than 67108864 in one call"),
        ("never_ends", "returned more values"),
    ],
)
def test_bad_call_fails_and_the_next_is_correct(name: str, why: str) -> None:
    timeout, memory = 2.0 if why == "reward.timeout" else 60.0, 2**28 if why == "MemoryError" else 0
    (bad,), (good,) = scored(name, "x", "a", memory=memory, timeout=timeout)
    assert bad.total is None
    assert why in str(bad.failure)
    assert (good.total, good.failure) == (1.0, None)


def test_a_death_is_explained_in_one_line(tmp_path: Path) -> None:
    """The last words are those of the process that died, and not of another one, and memory is shown if it is much."""
    limit = 2 * 10**9
    log = tmp_path / "rewards.log"
    with RewardPool([f"{HELL}:says_why_and_dies"], [], [], workers=2, memory=limit, log=log) as pool:
        quiet, (died,) = pool.score([group("a"), group("x")], {})[0]
    assert quiet[0].failure is None
    assert re.fullmatch(
        r"says_why_and_dies: its process died \(signal SIGKILL\); see rewards.log; it held up to 0\.[3-6] of 2\.0 GB; "
        r"its last words: 2 / 3\\x1b\[0m / the disk is full: �",
        str(died.failure),
    ), died.failure
    assert "\n" not in str(died.failure)


@pytest.mark.parametrize(
    "name",
    ["forks_and_both_return", "patches_json", "mutates", "leaves_a_thread", "generator"],
)
def test_unusual_call_is_correct_and_so_is_the_next(name: str) -> None:
    results = scored(name, "abc", "a", answer="7")
    assert [totals(rewards) for rewards in results] == ([[1], [1]] if name == "generator" else [[3], [1]])


def test_alarm_left_by_a_call_does_not_end_the_process() -> None:
    with RewardPool([f"{HELL}:leaves_an_alarm"], [], [], workers=1) as pool:
        assert totals(pool.score([group("abc")], {})[0][0]) == [3]
        time.sleep(1.3)  # the alarm rings after one second
        assert not pool._workers.members[0].process.gone


def test_changes_to_the_process_do_not_affect_answers(tmp_path: Path) -> None:
    log = tmp_path / "rewards.log"
    assert [totals(rewards) for rewards in scored("changes_the_process", "abc", "a", log=log)] == [[3.5], [1.5]]
    assert log.read_text() == "on standard output\nand on its descriptor\n" * 2


def test_process_left_behind_is_ended() -> None:
    ((reward,),) = scored("leaves_processes", "a")
    number = int(reward.extra["process"])
    deadline = time.monotonic() + 60
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_death_between_two_calls_does_not_fail_the_next() -> None:
    with RewardPool([f"{HELL}:dies_later"], [], [], workers=1) as pool:
        for _ in range(3):
            assert totals(pool.score([group("a")], {})[0][0]) == [1]
            assert pool._workers.members[0].process.process.wait(60) == 7


def test_process_that_stops_reading_is_replaced() -> None:
    """It is sent more than a pipe can hold."""
    with RewardPool([f"{HELL}:hides_its_thread"], [], ["text"], timeout=2.0, workers=1) as pool:
        assert totals(pool.score([group("a", text="")], {})[0][0]) == [1]
        time.sleep(0.5)
        (reward,) = pool.score([group("a", text="x" * 10**6)], {})[0][0]
        assert "reward.timeout" in str(reward.failure)


def test_process_that_leaks_is_replaced() -> None:
    rewards = [reward for (reward,) in scored("leaks", *"abcdefghi", memory=4 * 10**8)]
    assert any("MemoryError" in str(reward.failure) for reward in rewards)
    assert sum(reward.total == 1.0 for reward in rewards) >= 5


@pytest.mark.parametrize(
    ("text", "value"),
    [("bool", 1), ("int", 2), ("numpy", 0.5), ("numpy int", 3), ("0-d array", 1.5), ("torch", 2.5), ("decimal", 0.25),
     ("fraction", 0.25)],
)  # fmt: skip
def test_numbers_of_all_types(text: str, value: float) -> None:
    assert numbers()[text] == (value, None)


@pytest.mark.parametrize(
    ("text", "why"),
    [("text", "'1.0', not a number"), ("bytes", "b'1.0', not"), ("bytearray", "b'1.0', not"), ("numpy text", "1.0"),
     ("nan", "returned nan"), ("infinite", "returned -inf"), ("numpy nan", "returned nan"), ("huge", "OverflowError"),
     ("complex", "that is not a number"), ("list", "that is not a number"), ("unprintable", "cannot be printed")],
)  # fmt: skip
def test_values_that_are_not_numbers(text: str, why: str) -> None:
    total, failure = numbers()[text]
    assert total is None
    assert why in str(failure)


def numbers(cache: dict = {}) -> dict[str, tuple[float | None, str | None]]:  # noqa: B006  one process for all
    texts = ["bool", "int", "numpy", "numpy int", "0-d array", "torch", "decimal", "fraction", "text", "bytes",
             "bytearray", "numpy text", "nan", "infinite", "numpy nan", "huge", "complex", "list", "unprintable",
             "none"]  # fmt: skip
    if not cache:
        with RewardPool(["tests.rewards.functions:number_types"], [], [], timeout=120, workers=1) as pool:
            rewards = pool.score([group(*texts)], {})[0][0]
        cache.update({text: (reward.total, reward.failure) for text, reward in zip(texts, rewards, strict=True)})
    assert cache["none"] == (None, None)
    return cache


def test_secrets_are_not_passed_unless_the_recipe_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "A_CERTAIN_KEY", "Anything"):
        monkeypatch.setenv(name, "hidden-away")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hidden-away@proxy:1")
    monkeypatch.setenv("NO_PROXY", "localhost")
    ((reward,),) = scored("environment", "a")
    assert "hidden-away" not in reward.extra["environment"]
    passed = json.loads(reward.extra["environment"])
    assert passed["PATH"] == os.environ["PATH"]
    assert passed["NO_PROXY"] == "localhost"
    ((without,),) = scored("wants_a_key", "a")
    assert 'write reward.environment = ["A_CERTAIN_KEY"]' in str(without.failure)
    with RewardPool([f"{HELL}:wants_a_key"], [], [], workers=1, environment=["A_CERTAIN_KEY"]) as pool:
        assert totals(pool.score([group("a")], {})[0][0]) == [11]


def test_key_needed_at_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_CERTAIN_KEY", "hidden-away")
    (tmp_path / "r.py").write_text("import os\nos.environ['A_CERTAIN_KEY']\ndef f(completions): return []\n")
    with pytest.raises(UsageError, match=r'reward\.environment = \["A_CERTAIN_KEY"\]'):
        score(f"{tmp_path}/r.py:f", "a")


def test_import_does_not_count_as_call_time_and_shows_progress(tmp_path: Path) -> None:
    class Shows:
        def __init__(self) -> None:
            self.shown: list[tuple[str, float]] = []

        def bar(self, label, total, unit):
            import contextlib

            return contextlib.nullcontext(lambda amount: self.shown.append((label, amount)))

        def note(self, text):
            raise AssertionError(text)

    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1.2)\ndef f(completions, **_): return [1.0]\n")
    shows = Shows()
    with RewardPool([f"{tmp_path}/slow.py:f"], [], [], timeout=1.0, workers=1, progress=shows) as pool:  # type: ignore[arg-type]
        assert totals(pool.score([group("a")], {})[0][0]) == [1]
    assert ("Loading reward functions", 0) in shows.shown
    assert shows.shown[-1] == ("Loading reward functions", 1)


def test_import_that_never_ends_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.rollout.workers.process.LOAD_TIMEOUT", 0.5)
    (tmp_path / "never.py").write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(UsageError, match="loading the functions failed: it takes longer than"):
        score(f"{tmp_path}/never.py:f", "a")


def test_log_is_bounded_and_keeps_the_latest_output(tmp_path: Path) -> None:
    output = Output(LogFile(tmp_path / "rewards.log").append)
    with output.open() as printer:
        for number in range(40):
            os.write(printer.descriptor, f"{number}\n".encode() + b"x" * 2**20)
        os.write(printer.descriptor, b"the end\n")
    output.close()
    assert printer.last_lines()[-1].endswith("xthe end")
    assert (tmp_path / "rewards.log").read_bytes().endswith(b"the end\n")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * MOST_BYTES + 2**17
    assert old_log(tmp_path / "rewards.log") == tmp_path / "rewards.old.log"


def test_channel_never_blocks_and_keeps_messages_whole() -> None:
    (read, write), (back_read, back_write) = os.pipe(), os.pipe()
    channel = Channel(back_read, write)
    message = bytes(range(256)) * 2000
    channel.send(message)
    assert channel.waits_to_write
    assert channel.receive() is None
    sent = b""
    while len(sent) < len(message) + 4:
        sent += os.read(read, 2**20)
        channel.flush()
    assert sent[4:] == message
    os.write(back_write, sent[:100])
    assert channel.receive() is None
    for start in range(100, len(sent), 2**15):
        os.write(back_write, sent[start : start + 2**15])
        received = channel.receive()
    assert received == message
    os.write(back_write, b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="of -1 bytes"):
        channel.receive()
    os.close(read)
    channel.send(b"no reader")
    assert not channel.waits_to_write
    channel.close()
    os.close(back_write)
