"""User-defined classes in their own processes: state, randomness, and classes that hang, die or return bad values."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gruppo.config.sections import Environment
from gruppo.errors import UsageError
from gruppo.rollout.environments.client import (
    Answer,
    EnvironmentHandle,
    ProcessEnvironments,
    PythonEnvironments,
    open_environments,
)
from gruppo.utils.progress import NullProgress
from gruppo.utils.waiting import WaitWatcher
from tests.rollout.environments.test_protocol import FakePool

WORLDS = "tests/rollout/environments/worlds.py"


def nothing() -> None:
    pass


def hosted(name: str, **fields: object) -> ProcessEnvironments:
    settings = Environment(name=f"{WORLDS}:{name}", **{"workers": 1, **fields})  # type: ignore[arg-type]
    return ProcessEnvironments(settings, [], None, NullProgress())


def plays(*rows: dict, seed: int = 1) -> list[EnvironmentHandle]:
    return [EnvironmentHandle(number, row, seed) for number, row in enumerate(rows)]


def say(environments: ProcessEnvironments, played: list[EnvironmentHandle], *texts: str) -> list[Answer]:
    for play, text in zip(played, texts, strict=True):
        play.texts.append(text)
    return environments.answer(played, nothing)


@pytest.fixture(scope="module")
def letters() -> Iterator[ProcessEnvironments]:
    environments = hosted("Letters", options={"rounds": 2})
    yield environments
    environments.close()


def test_environments_keep_separate_state(letters: ProcessEnvironments) -> None:
    two = plays({}, {})
    assert (letters.stop, letters.schemas, letters.gives_reward) == (("?", "="), [], True)
    assert letters.answer(two, nothing) == [Answer(), Answer()]
    assert say(letters, two, "ab", "xy") == [Answer(("+",)), Answer(("+",))]
    assert say(letters, two, "z", "c") == [Answer(("--",), done=True)] * 2
    assert [answer.reward for answer in letters.end(two, nothing)] == [2 / 3, 1 / 3]


def test_a_lost_process_is_replaced(letters: ProcessEnvironments) -> None:
    """Its environments are rebuilt by repeating their turns; the answers do not change."""
    (play,) = plays({})
    letters.answer([play], nothing)
    say(letters, [play], "ab")
    letters._workers.members[0].process.process.kill()
    letters._workers.members[0].process.process.wait()
    assert say(letters, [play], "z") == [Answer(("--",), done=True)]

    letters._workers.replace(letters._workers.members[0])
    assert [answer.reward for answer in letters.end([play], nothing)] == [2 / 3]


def test_pythons_random_numbers_depend_only_on_seed_and_turn() -> None:
    results = []
    for count in (1, 3):
        environments = hosted("Random")
        played = [*plays({}, seed=7), *(EnvironmentHandle(number, {}, 8) for number in range(1, count))]
        environments.answer(played, nothing)
        first = say(environments, played, *["x"] * count)[0]
        environments._places.clear()  # as if in another process
        results.append((first, say(environments, played, *["y"] * count)[0], environments.end(played[:1], nothing)[0]))
        environments.close()
    assert results[0] == results[1]
    assert results[0][2].reward is not None


@pytest.mark.parametrize("limit", [1.0])
def test_failures_affect_only_their_own_environment(limit: float) -> None:
    behaviors = [
        "hang in reset", "die in reset", "raise in reset", "hang in step", "die in step", "raise in step", "no turn",
        "no text", "hang in get_reward", "die in get_reward", "raise in get_reward", "nan", "text", "none", "well",
    ]  # fmt: skip
    environments = hosted("Fails", seconds=limit)
    played = plays(*({"what": behavior} for behavior in behaviors))
    failures: dict[str, str | None] = {}
    alive, ends = played, []
    for ask in ("reset", "step", "end"):
        if ask == "step":
            answers = say(environments, alive, *["x"] * len(alive))
        else:
            answers = (environments.end if ask == "end" else environments.answer)(alive, nothing)
        failures |= {
            play.row["what"]: answer.failure for play, answer in zip(alive, answers, strict=True) if answer.failure
        }
        ends = [answer.reward for answer in answers if not answer.failure]
        alive = [play for play, answer in zip(alive, answers, strict=True) if not answer.failure]
    environments.close()
    assert [play.row["what"] for play in alive] == ["none", "well"]
    assert ends == [None, 1.0]
    for what, why in failures.items():
        expected = {"hang": "environment.seconds", "die ": "process died", "rais": "is broken"}
        assert expected.get(what[:4], "") in str(why)
    assert "not a Turn" in str(failures["no turn"])
    assert "not text" in str(failures["no text"])
    assert "get_reward returned nan" in str(failures["nan"])


def test_long_observations_are_truncated_with_a_note() -> None:
    environments = hosted("Greets", output=3)
    (play,) = plays({})
    environments._places.clear()
    assert environments._cut("abcdef") == "abc… (3 more characters)"
    assert environments.answer([play], nothing) == [Answer(("b",))]
    environments.close()


def test_classes_are_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="neither step"):
        hosted("NoTools")
    with pytest.raises(UsageError, match="cannot be imported"):
        hosted("worlds_that_are_not_there.py:X")


def test_python_blocks_run_in_sandboxes() -> None:
    pool = FakePool()
    environments = PythonEnvironments(pool, 2)
    played = plays({}, {}, {})
    assert environments.answer(played, nothing) == [Answer()] * 3
    block = "```python\nx\n```\n"
    answers = say(environments, played, block, "no code", block)  # type: ignore[arg-type]
    assert answers == [Answer(("```output\n1\n```\n",), calls=1), Answer(), Answer(("```output\n1\n```\n",), calls=1)]
    environments.end(played[:1], nothing)
    assert sorted(session.closed for session in pool.sessions) == [False, True]
    environments.close()
    assert pool.closed
    assert all(session.closed for session in pool.sessions)


def test_no_sandbox_is_needed_if_nothing_is_sampled() -> None:
    open_environments(Environment(name="python"), [], None, NullProgress(), played=False).close()


class Notes:
    """Raises in `tick` once it was told that something is waited for."""

    def __init__(self, awaited: str) -> None:
        self.awaited, self.noted = awaited, threading.Event()

    def tell(self, text: str, _: bool) -> None:
        if text.startswith(f"waiting for {self.awaited} since "):
            self.noted.set()

    def tick(self) -> None:
        if self.noted.is_set():
            raise NotedError


class NotedError(Exception):
    """The watcher has told."""


def test_an_environment_that_hangs_is_named() -> None:
    environments, notes = hosted("Fails", seconds=3600), Notes(f"environment {WORLDS}:Fails")
    (play,) = plays({"what": "hang in step"})
    environments.answer([play], nothing)
    play.texts.append("a")
    with WaitWatcher(notes.tell, first=0.05).running(0.01), pytest.raises(NotedError):
        environments.answer([play], notes.tick)
    environments.close()


def test_a_sandbox_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, pool = Notes("Python blocks in the sandbox"), FakePool()
    environments = PythonEnvironments(pool, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(PythonEnvironments, "_step", lambda *_: notes.noted.wait(600))
    with WaitWatcher(notes.tell, first=0.05).running(0.01), pytest.raises(NotedError):
        environments.answer(plays({}, {}), notes.tick)
    environments.close()
