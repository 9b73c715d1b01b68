"""Functions of verl and verifiers as rewards: by name in a recipe, and from Python."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.errors import UsageError
from gruppo.rewards import PREFIXES
from gruppo.rewards.interop import ADAPTERS, verifiers, verl
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Reward
from tests.rewards import other_trainers
from tests.rollout.workers.test_rewards import group, totals

FILE = "tests/rewards/other_trainers.py"


def scored(
    function: Any, *texts: str, chat: bool = False, options: dict[str, Any] | None = None, **columns: Any
) -> tuple[list[Reward], dict[str, list[float]]]:
    named = {function: options} if options else {}
    with RewardPool([function], [], list(columns), workers=1, options=named) as pool:
        rewards, metrics = pool.score([group(*texts, chat=chat, **columns)], {})
    return rewards[0], metrics


def values(*arguments: Any, **columns: Any) -> list[float | None]:
    return totals(scored(*arguments, **columns)[0])


@pytest.mark.parametrize("function", [f"verl:{FILE}:compute_score", verl(other_trainers.compute_score)])
def test_verl(function: Any) -> None:
    assert values(function, "is 4", "is 5", ground_truth="4") == [0.5, 0]
    assert values(function, "is 4", "", ground_truth="4", data_source="openai/gsm8k") == [1, 0]
    assert values(function, "is 4", "is 5", chat=True, ground_truth="4") == [0.5, 0]


def test_verl_rows_have_the_ground_truth_in_reward_model() -> None:
    row = {"reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "openai/gsm8k", "answer": "5"}
    assert values(f"verl:{FILE}:compute_score", "4", "5", **row) == [1, 0]
    assert values(f"verl:{FILE}:compute_score", "4", "5", answer="5") == [0, 0.5]
    rewards, _ = scored(f"verl:{FILE}:compute_score", "4", reward_model={"style": "model"})
    assert rewards[0].total is None
    assert "ground_truth" in str(rewards[0].failure)


def test_verl_dict_score_is_the_reward_and_the_rest_is_logged() -> None:
    rewards, metrics = scored(
        f"verl:{FILE}:with_parts",
        "4",
        "5",
        options={"bonus": 0.25},
        ground_truth="4",
        extra_info={"difficulty": 3},
    )
    assert totals(rewards) == [1.25, 0.25]
    assert metrics == {"acc": [1, 0], "difficulty": [3, 3]}
    assert [reward.extra["pred"] for reward in rewards] == ["4", "5"]
    assert list(rewards[0].parts) == ["with_parts"]


def test_verl_async_calls_fail_one_by_one() -> None:
    rewards, _ = scored(f"verl:{FILE}:judged", "abc", "broken", "", answer="x")
    assert totals(rewards) == [3, None, 0]
    assert "RuntimeError: no judge" in str(rewards[1].failure)


def test_verl_function_with_its_own_event_loop() -> None:
    assert values(f"verl:{FILE}:runs_its_own_loop", "abc", answer="x") == [3]


def test_verl_dict_without_score_is_a_failure() -> None:
    rewards, _ = scored(f"verl:{FILE}:without_score", "4")
    assert rewards[0].total is None
    assert 'without "score"' in str(rewards[0].failure)


@pytest.mark.parametrize("function", [f"verifiers:{FILE}:exact_answer", verifiers(other_trainers.exact_answer)])
def test_verifiers(function: Any) -> None:
    assert values(function, "4", "5", "", chat=True, answer="4") == [1, 0, 0]


def test_verifiers_without_columns() -> None:
    assert values(f"verifiers:{FILE}:exact_answer", "", "5", chat=True) == [1, 0]


def test_verifiers_async_with_all_arguments() -> None:
    """A prompt of one message and completions of one and three letters."""
    assert values(f"verifiers:{FILE}:asked", "a", "abc", chat=True) == [2, 4]


def test_verifiers_state_info_and_options() -> None:
    name = f"verifiers:{FILE}:reads_the_state"
    assert values(name, "a", chat=True, info={"level": 3}, task="sums") == [3]
    assert values(name, "a", chat=True, options={"scale": 2.0}, info={"level": 3}, task="sums") == [6]
    assert values(name, "a", chat=True) == [-1]


def test_verifiers_failure_excludes_one_completion() -> None:
    """Text prompts have text completions, here of lengths 2, 0 and 4."""
    rewards, _ = scored(f"verifiers:{FILE}:fails_on_empty", "ab", "", "abcd")
    assert totals(rewards) == [0.5, None, 0.25]
    assert "ZeroDivisionError" in str(rewards[1].failure)


def test_class_behind_an_adapter() -> None:
    assert values(f"verifiers:{FILE}:Judge", "a", "b", options={"value": 0.5}) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("verl:compute_score", {}, ['"verl:compute_score"', "verl:file.py:function"]),
        ("verifiers:", {}, ["verifiers:package.module:function"]),
        (f"verl:{FILE}:none_such", {}, ["none_such"]),
        ("verl:no.such.module:f", {}, ["no.such.module", "cannot be imported"]),
        (f"verl:{FILE}:needs_a_tokenizer", {}, ["needs_a_tokenizer", '"tokenizer"', "does not pass"]),
        (f"verl:{FILE}:compute_score", {}, ["ground_truth or reward_model or answer", "in every row"]),
        (f"verl:{FILE}:with_parts", {"bonsu": 1}, ["with_parts", 'did you mean "bonus"']),
        (f"verifiers:{FILE}:exact_answer", {"answer": "4"}, ["the run passes answer itself"]),
    ],
)
def test_unusable_function_is_refused_at_start(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        RewardPool([name], [], [], options={name: options})
    for word in words:
        assert word in str(caught.value)


def test_every_prefix_has_an_adapter() -> None:
    assert set(PREFIXES) == set(ADAPTERS)


def test_adapters_with_equal_names_have_different_digests() -> None:
    """The digest is that of the user's function, so that resuming notices a change."""
    with RewardPool(
        [verl(lambda solution_str: 1.0), verl(lambda solution_str: 2.0 * len(solution_str))], [], []
    ) as pool:
        assert pool.names == ["<lambda>", "<lambda>_1"]
        assert pool.digests[0] != pool.digests[1]
