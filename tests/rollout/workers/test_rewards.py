"""The reward contract: accepted values, excluded completions, and isolation of the trainer's process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gruppo.errors import RunError, UsageError
from gruppo.rewards.combine import combine
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Prompt, Reward, Steps
from tests.conftest import make_completion

HOME = "tests.rewards.functions"


def group(*texts: str, chat: bool = False, **columns: object) -> tuple[Prompt, list]:
    content = [{"role": "user", "content": "q"}] if chat else "q"
    completions = []
    for text in texts:
        completion = make_completion([1, 2])
        object.__setattr__(completion, "text", text)
        completions.append(completion)
    return Prompt("t/0", content, (1,), "t", columns), completions


def score(function: object, *texts: str, chat: bool = False, **columns: object) -> list[Reward]:
    with RewardPool([function], [], list(columns), timeout=5, workers=1) as pool:
        return pool.score([group(*texts, chat=chat, **columns)], {"global_step": 4})[0][0]


def totals(rewards: list[Reward]) -> list[float | None]:
    return [reward.total for reward in rewards]


def test_import_path_builtin_file_function_and_object() -> None:
    assert totals(score(f"{HOME}:length", "ab", "c")) == [2, 1]
    assert totals(score("tests/rewards/functions.py:length", "ab", "c")) == [2, 1]
    assert totals(score("last_number", "is 4", "is 5", answer="4")) == [1, 0]
    assert totals(score("exact_match", "4", "is 4", answer="4")) == [1, 0]
    factor = 3
    assert totals(score(lambda completions, **_: [factor] * len(completions), "a", "b")) == [3, 3]
    assert totals(score(f"{HOME}:instance", "a")) == [3]


def test_async() -> None:
    assert totals(score(f"{HOME}:waits", "a", "b")) == [2, 2]


def test_only_named_arguments_are_passed() -> None:
    assert totals(score(f"{HOME}:named_arguments_only", "4", "5", answer="4", other=1)) == [1, 0]


def test_conversations_arrive_as_messages() -> None:
    def reads(prompts, completions, completion_ids, level, **kwargs):
        assert prompts == [[{"role": "user", "content": "q"}]] * 2
        assert completions == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
        assert completion_ids == [[1, 2], [1, 2]]
        assert level == [7, 7]
        return [1.0, 2.0]

    rewards = score(reads, "a", "b", chat=True, level=7)
    assert [reward.failure for reward in rewards] == [None, None]
    assert totals(rewards) == [1, 2]
    assert totals(score("last_number", "so 4", chat=True, answer=4)) == [1]


def test_a_group_is_scored_in_one_call() -> None:
    assert totals(score(lambda completions, **_: [len(completions)] * len(completions), *"abc")) == [3, 3, 3]


def test_sum_is_weighted_and_leaves_out_none() -> None:
    """trl#5775: None means that the reward does not apply to the row."""
    with RewardPool([f"{HOME}:length", f"{HOME}:sometimes"], [0.5, 2.0], []) as pool:
        rewards = pool.score([group("skip", "ab")], {})[0][0]
    assert totals(rewards) == [2.0, 3.0]
    assert dict(rewards[0].parts) == {"length": 4.0, "sometimes": None}


def test_none_from_every_function_excludes_without_a_failure() -> None:
    (reward,) = score(f"{HOME}:never", "a")
    assert reward.total is None
    assert reward.failure is None


def test_metrics_extra_and_state() -> None:
    with RewardPool([f"{HOME}:logs"], [], []) as pool:
        rewards, metrics = pool.score([group("a", "b"), group("c")], {"global_step": 4})
    assert metrics == {"answers": [2.0, 1.0]}
    assert [dict(reward.extra) for reward in rewards[0]] == [{"seen": "A"}, {"seen": "B"}]
    assert totals(rewards[0]) == [4, 4]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("hang", "reward.timeout"),
        ("spin", "reward.timeout"),
        ("exit", "died (exit code 3)"),
        ("system exit", "SystemExit"),
        ("raise", "RuntimeError: broken on purpose"),
        ("unprintable", "RuntimeError: lone ? surrogate"),
        ("short", "1 values for 2 completions"),
        ("text", "not a list"),
        ("none", "not a list"),
    ],
)
def test_failed_call_excludes_its_group_and_no_other(word: str, reason: str) -> None:
    """verl#5839, trl#6533: no hang, no substitute value, and the next group is scored."""
    with RewardPool([f"{HOME}:misbehaves"], [], [], timeout=2.0, workers=1) as pool:
        rewards = pool.score([group("a", "b"), group(word, "b"), group("c", "d")], {})[0]
    assert totals(rewards[0]) == totals(rewards[2]) == [1, 1]
    for reward in rewards[1]:
        assert reward.total is None
        assert reward.failure is not None
        assert reason in reward.failure


@pytest.mark.parametrize("word", ["words", "nan", "infinite", "huge"])
def test_value_that_is_not_a_number_excludes_only_its_completion(word: str) -> None:
    first, second = score(f"{HOME}:misbehaves", word, "b")
    assert first.total is None
    assert first.failure is not None
    assert second.total == 1.0


def test_output_of_rewards_goes_to_the_log(tmp_path) -> None:
    with RewardPool([f"{HOME}:misbehaves"], [], [], log=tmp_path / "rewards.log") as pool:
        assert totals(pool.score([group("prints", "b")], {})[0][0]) == [1, 1]
    assert (tmp_path / "rewards.log").stat().st_size > 5_000_000


def test_function_from_a_folder_on_sys_path(tmp_path, monkeypatch) -> None:
    """A script's own folder is on sys.path; the reward process must find its modules too."""
    (tmp_path / "beside_the_script.py").write_text(
        "def reward(completions, **_):\n    return [5.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from beside_the_script import reward  # type: ignore[import-not-found]

    assert totals(score(reward, "a")) == [5]


def test_rewards_run_in_other_processes() -> None:
    assert totals(score(lambda completions, **_: [os.getpid()], "a")) != [os.getpid()]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("last_numbr", ["last_numbr", 'did you mean "last_number"']),
        ("no.such.module:f", ["no.such.module:f", "cannot be imported"]),
        (f"{HOME}:none_such", ["none_such"]),
        (f"{HOME}:not_callable", ["callable"]),
        (f"{HOME}:needs_more", ["solution", "offered"]),
        (f"{HOME}:takes_nothing", ["takes no completions"]),
        (f"{HOME}:positional", ["positional-only"]),
        ("none.py:f", ["none.py"]),
        ("last_number", ["answer"]),
    ],
)
def test_unusable_function_is_refused_at_start(function: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        RewardPool([function], [], [])
    for word in words:
        assert word in str(caught.value)


def test_no_function_at_all() -> None:
    with pytest.raises(UsageError, match=r"reward\.functions = \[\]"):
        RewardPool([], [], [])


def test_slow_import_of_a_replacement_does_not_time_out_other_calls(tmp_path) -> None:
    """While the replacement of a killed worker imports, answers of other workers count from their arrival."""
    (tmp_path / "slow.py").write_text(
        "import time\ntime.sleep(3.5)\n"
        "def f(completions, **_):\n"
        "    time.sleep(60 if completions[0] == 'hang' else 0.4)\n"
        "    return [1.0] * len(completions)\n"
    )
    with RewardPool([f"{tmp_path}/slow.py:f"], [], [], timeout=3.0, workers=2) as pool:
        rewards = pool.score([group("hang"), *(group("a") for _ in range(6))], {})[0]
    assert [totals(scored) for scored in rewards] == [[None], *[[1]] * 6]


def test_file_that_changes_during_a_run_stops_it(tmp_path) -> None:
    """A replacement process must not score with different code than the run started with."""
    path = tmp_path / "changes.py"
    path.write_text("import os\ndef f(completions, **_):\n    os._exit(1)\n")
    with RewardPool([f"{path}:f"], [], [], workers=1) as pool:
        path.write_text("def f(completions, **_):\n    return [1.0] * len(completions)\n")
        with pytest.raises(RunError, match="changed since the run began"):
            pool.score([group("a"), group("b")], {})


@pytest.mark.parametrize(("action", "how"), [("os.kill(os.getpid(), 40)", "signal 40"),
                                             ("raise KeyboardInterrupt", "KeyboardInterrupt"),
                                             ("os.kill(os.getpid(), 11)", "SIGSEGV")])  # fmt: skip
def test_cause_of_death_is_reported(tmp_path, action: str, how: str) -> None:
    (tmp_path / "dies.py").write_text(f"import os\ndef f(completions, **_):\n    {action}\n")
    (reward,) = score(f"{tmp_path}/dies.py:f", "a")
    assert reward.failure is not None
    assert how in reward.failure


def test_async_rewards_share_one_event_loop() -> None:
    """A client or semaphore created in one call must work in the next."""
    assert [totals(scored) for scored in _scored_twice(f"{HOME}:shares_a_semaphore")] == [[1, 1], [1, 1]]


def _scored_twice(function: str) -> list[list[Reward]]:
    with RewardPool([function], [], [], workers=1) as pool:
        return [pool.score([group("a", "b")], {})[0][0] for _ in range(2)]


def test_column_that_cannot_be_sent_is_a_failure() -> None:
    class Unpicklable:
        def __reduce__(self):
            return (int, ("not a number",))

    (reward,) = score(f"{HOME}:length", "a", column=Unpicklable())
    assert reward.failure is not None
    assert "cannot be unpickled" in reward.failure
    assert totals(
        score(lambda completions, column, **_: [column[0](2)] * len(completions), "a", column=lambda x: x + 1)
    ) == [3]


def test_a_value_that_is_not_a_function_is_refused() -> None:
    with pytest.raises(UsageError, match="must be a function or an import path"):
        RewardPool([3], [], [])  # type: ignore[list-item]


def test_equal_names_are_numbered() -> None:
    with RewardPool([f"{HOME}:length"] * 3, [], []) as pool:
        assert pool.names == ["length", "length_1", "length_2"]


def test_a_stop_request_ends_a_hanging_call_and_leaves_the_pool_usable() -> None:
    class StopError(Exception):
        pass

    def stop(_: float) -> None:
        raise StopError

    with RewardPool([f"{HOME}:misbehaves"], [], [], timeout=60, workers=1) as pool:
        with pytest.raises(StopError):
            pool.score([group("hang", "b")], {}, stop)
        assert totals(pool.score([group("a", "b")], {})[0][0]) == [1, 1]


def test_sum_that_overflows_is_excluded() -> None:
    assert combine(["a", "b"], [1.0, 1.0], [1e308, 1e308], {}).total is None


def test_step_rewards_are_kept_separate_from_the_total() -> None:
    (first, second), _ = scored_steps("ab", "z")
    assert first.steps == {"steps": Steps((1.0,), (0,))}
    assert first.total == 4.0  # of `length`, with weight 2
    assert first.parts == {"steps": None, "length": 2.0}
    assert second.steps == {"steps": Steps((0.0,), (0,))}


def scored_steps(*texts: str) -> tuple[list[Reward], dict]:
    with RewardPool([f"{HOME}:steps", f"{HOME}:length"], [1.0, 2.0], [], timeout=5, workers=1) as pool:
        rewards, metrics = pool.score([group(*texts)], {})
    return rewards[0], metrics


def test_completion_with_only_step_rewards_is_not_excluded() -> None:
    (reward,) = score(f"{HOME}:steps", "ab")
    assert reward.total == 0.0
    assert reward.failure is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("names", "returned a mapping of rewards, not of step_rewards and step_ends"),
        ("few", "step_ends = [0] for 2 step_rewards and 2 tokens"),
        ("back", "step_ends = [1, 0] for 2 step_rewards"),
        ("late", "step_ends = [99] for 1 step_rewards"),
        ("nan", "returned a step reward of nan"),
        ("text", "not lists of numbers"),
        ("half", "not lists of numbers"),
    ],
)
def test_invalid_steps_are_a_failure_with_the_reason(text: str, why: str) -> None:
    (reward,) = score(f"{HOME}:invalid_steps", text)
    assert reward.total is None
    assert why in str(reward.failure)


PRINTS = """
import sys
def talks(completions, prompts, **_):
    print("scores", prompts[0])
    print("careful", file=sys.stderr)
    return [1.0] * len(completions)
def floods(completions, **_):
    print("x" * 20_000)
    return [0.0] * len(completions)
def silent(completions, **_):
    return [0.0] * len(completions)
def fails(completions, **_):
    print("about to fail")
    raise ValueError("no")
"""


def test_what_a_call_prints_is_kept_and_logged(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    names = ("talks", "floods", "silent", "fails")
    log = tmp_path / "rewards.log"
    with RewardPool([f"{tmp_path}/prints.py:{name}" for name in names], [], [], workers=1, log=log) as pool:
        for _ in range(2):
            (first, second), _ = pool.score([group("a", "b"), group("c")], {})
            printed = first[0].printed
            assert printed.keys() == {"talks", "floods", "fails"}
            assert printed["talks"] == "scores q\ncareful\n"
            assert printed["floods"].startswith("x" * 16_384)
            assert printed["floods"].endswith("\n[3617 more characters in rewards.log]")
            assert printed["fails"] == "about to fail\n"
            assert first[1].printed == printed
            assert second[0].printed["talks"] == printed["talks"]
    assert log.read_text(errors="replace").count("scores q") == 4
