"""Reward functions of TRL and in the style of open-r1 run unchanged."""

from __future__ import annotations

import pytest
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Reward
from tests.rollout.workers.test_rewards import group, totals

OPEN_R1 = "tests/rewards/open_r1.py"
HALF = r"\frac{1}{2}"
RIGHT, WRONG = r"So \boxed{0.5}", r"So \boxed{0.6}"
FORMED = "<think>\nFirst, add.\n</think>\n<answer>\n4\n</answer>"


def scored(function: object, *texts: str, lengths: list[int] | None = None, **columns: object) -> list[Reward]:
    """Rewards of completions of a conversation. `lengths`: their numbers of tokens."""
    prompt, completions = group(*texts, chat=True, **columns)
    for completion, length in zip(completions, lengths or []):
        object.__setattr__(completion, "token_ids", tuple(range(length)))
    with RewardPool([function], [], list(columns), timeout=30, workers=1) as pool:  # type: ignore[list-item]
        rewards = pool.score([(prompt, completions)], {})[0][0]
    assert [reward.failure for reward in rewards] == [None] * len(texts)
    return rewards


@pytest.mark.parametrize("function", [accuracy_reward, "trl.rewards:accuracy_reward"])
def test_trl_accuracy(function: object) -> None:
    rewards = scored(function, RIGHT, WRONG, solution=HALF)
    assert totals(rewards) == [1, 0]
    assert [reward.extra["solution"] for reward in rewards] == [HALF, HALF]
    assert "'0.5'" in rewards[0].extra["answer_parsed"]
    assert totals(scored(function, RIGHT, solution="no formula")) == [None]


def test_trl_reasoning_accuracy() -> None:
    texts = f"<think>x</think>{RIGHT}", f"<think>{RIGHT}</think>{WRONG}", f"<think>{RIGHT}"
    assert totals(scored(reasoning_accuracy_reward, *texts, solution=HALF)) == [1, 0, 0]


def test_trl_think_format() -> None:
    assert totals(scored(think_format_reward, "<think>a</think>b", "<think>a", "b", "")) == [1, 0, 0, 0]


def test_trl_soft_overlong_punishment() -> None:
    """L = 20, cache 8: 0 up to 12, then an eighth less for each token, -1 above 20."""
    function = get_soft_overlong_punishment(20, 8)
    assert totals(scored(function, *"abcde", lengths=[12, 14, 16, 20, 21])) == [0, -0.25, -0.5, -1, -1]


def test_trl_repetition_penalty() -> None:
    """Tokens 0, 1, 2, 3 repeat no pair; the completion of two tokens has a single pair."""
    assert totals(scored(get_repetition_penalty_reward(2), "a", "b", lengths=[4, 2])) == [0, 0]


def test_trl_cosine_scaled() -> None:
    """At half the maximum length the cosine is 0: correct (0.5 + 1) / 2, wrong (-0.5 - 1) / 2."""
    function = get_cosine_scaled_reward(max_len=20)
    assert totals(scored(function, RIGHT, WRONG, lengths=[10, 10], solution=HALF)) == pytest.approx([0.75, -0.75])


def test_open_r1_accuracy() -> None:
    assert totals(scored(f"{OPEN_R1}:accuracy_reward", RIGHT, WRONG, "0.5", solution=HALF)) == [1, 0, 0]
    assert totals(scored(f"{OPEN_R1}:accuracy_reward", RIGHT, solution="nothing")) == [None]


def test_open_r1_format() -> None:
    assert totals(scored(f"{OPEN_R1}:format_reward", FORMED, "Well.\n" + FORMED, "4")) == [1, 0, 0]


def test_open_r1_tag_count() -> None:
    """Without the last line, three of four tags; doubled, all four tags occur twice."""
    texts = FORMED, FORMED.removesuffix("\n</answer>"), FORMED * 2, ""
    assert totals(scored(f"{OPEN_R1}:tag_count_reward", *texts)) == [1, 0.75, 0, 0]


def test_open_r1_reasoning_steps() -> None:
    texts = "Step 1: a Step 2: b", "First, a\n- b\n* c", "1. a", "a"
    assert totals(scored(f"{OPEN_R1}:reasoning_steps_reward", *texts)) == pytest.approx([2 / 3, 1, 1 / 3, 0])


def test_open_r1_length() -> None:
    """Lengths 14, 18 and 22: 0.5, 0 and -0.5; the short wrong answer gets 0 instead of 0.5."""
    texts = RIGHT, RIGHT + "....", WRONG + "........", WRONG
    assert [len(text) for text in texts] == [14, 18, 22, 14]
    assert totals(scored(f"{OPEN_R1}:len_reward", *texts, solution=HALF)) == [0.5, 0, -0.5, 0]
    assert totals(scored(f"{OPEN_R1}:len_reward", RIGHT, WRONG, solution=HALF)) == [0, 0]


def test_open_r1_cosine() -> None:
    """max_len 100: the cosine is 0 at length 50 and 1 at length 0; the shortest wrong answer costs most."""
    texts = RIGHT.rjust(50), WRONG.rjust(50), ""
    assert totals(scored(f"{OPEN_R1}:cosine", *texts, solution=HALF)) == pytest.approx([0.75, -0.75, -1])


def test_open_r1_repetition() -> None:
    """ "a a a a a" has three trigrams, one of them distinct."""
    rewards = scored(f"{OPEN_R1}:repetition", "a a a A a", "a b c d", "a b", "")
    assert totals(rewards) == pytest.approx([-2 / 3, 0, 0, 0])


def test_open_r1_code() -> None:
    cases = [{"input": 2, "output": 4}, {"input": 3, "output": 9}]
    texts = "```python\nx * x```", "```python\nx + 2```"
    info = {"language": "python", "test_cases": cases}
    assert totals(scored(f"{OPEN_R1}:binary_code_reward", *texts, verification_info=info)) == [1, 0]
    info = {"language": "cobol", "test_cases": cases}
    assert totals(scored(f"{OPEN_R1}:binary_code_reward", *texts, verification_info=info)) == [None, None]


def test_factory_called_in_the_users_script() -> None:
    """A closure is sent to the reward process."""
    from tests.rewards.open_r1 import get_repetition_penalty_reward as factory

    assert totals(scored(factory(2, -0.5), "a a a", "a b c")) == [-0.25, 0]
