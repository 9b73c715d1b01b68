"""The guessing game, worked by hand."""

from __future__ import annotations

import pytest

from gruppo.rollout.environments.guess_number import Guess, load
from gruppo.rollout.environments.loading import load_environment
from gruppo.rollout.environments.protocol import Turn


def test_rows() -> None:
    rows = load("train", 10, 12)
    assert [row["most"] for row in rows] == [10, 11, 12]
    assert "from 1 to 12." in rows[2]["prompt"][0]["content"]


def started(number: int) -> Guess:
    game = Guess(3)
    game.reset({"most": 10}, 0)
    game.number = number
    return game


def test_a_game_that_is_won() -> None:
    game = started(7)
    assert game.step("Is it 3? or 4") == Turn("Higher.")
    assert game.step("9") == Turn("Lower.")
    assert game.step("7!") == Turn("Right.", done=True)
    assert game.get_reward() == 1.0


def test_a_game_that_is_lost() -> None:
    game = started(7)
    assert game.step("none") == Turn("That is no number from 1 to 10.")
    assert game.get_reward() == 0.0
    assert game.step("11") == Turn("That is no number from 1 to 10.")
    assert game.step("9") == Turn("Lower.", done=True)
    assert game.get_reward() == pytest.approx(0.5 * 0.8)


def test_the_number_depends_on_the_seed() -> None:
    numbers = []
    for seed in (1, 1, 2, 3, 4):
        game = Guess()
        game.reset({"most": 1000}, seed)
        numbers.append(game.number)
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 4


def test_it_loads_as_a_gruppo_environment() -> None:
    loaded = load_environment("gruppo.rollout.environments.guess_number:Guess", {"guesses": 2})
    assert (loaded.gives_reward, loaded.schemas) == (True, [])
