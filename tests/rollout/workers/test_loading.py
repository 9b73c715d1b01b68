"""Processes that die while they load the user's code: they are started again, a bounded number of times."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gruppo.config.sections import Environment
from gruppo.errors import RunError, UsageError
from gruppo.rollout.environments.client import Answer, EnvironmentHandle, ProcessEnvironments
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.rollout.workers.worker_set import PAUSES
from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from gruppo.utils.progress import NullProgress
from tests.rollout.workers.test_rewards import group, totals

# Each import takes the next line of the file `plan`, and does what it says.
CODE = """
import os, pathlib, sys, time

plan = pathlib.Path(__file__).with_name("plan")
first, _, rest = plan.read_text().partition("\\n")
plan.write_text(rest)
exec(first)

def f(completions, **_):
    if completions[0] == "x":
        os.kill(os.getpid(), 9)
    return [1.0] * len(completions)

class World:
    def reset(self, row, seed):
        return "hello"

    def step(self, text):
        if text == "x":
            os.kill(os.getpid(), 9)
        return {turn}
"""
KILLED, EXIT = "os.kill(os.getpid(), 9)", "os._exit(3)"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.rollout.workers.worker_set.PAUSES", tuple(0.01 for _ in PAUSES))


def planned(folder: Path, *actions: str) -> str:
    """A file whose first imports do these things."""
    (folder / "plan").write_text("".join(f"{action}\n" for action in actions))
    code = CODE.replace("{turn}", "__import__('gruppo').Turn('well')")
    (folder / "mine.py").write_text(code)
    return f"{folder}/mine.py"


def pool(file: str, workers: int = 1) -> RewardPool:
    return RewardPool([f"{file}:f"], [], [], workers=workers)


@pytest.mark.parametrize("action", [KILLED, EXIT, "os.abort()", "os.closerange(0, 200)"])
def test_death_at_the_start_is_repeated(tmp_path: Path, action: str) -> None:
    with pool(planned(tmp_path, action, action), workers=2) as opened:
        assert totals(opened.score([group("a")], {})[0][0]) == [1]


def test_death_at_every_start_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reward.functions: loading the functions failed: .*\(exit code 3\)"):
        pool(planned(tmp_path, *[EXIT] * 10))
    assert (tmp_path / "plan").read_text().count("\n") == 10 - (len(PAUSES) + 1)


def test_error_at_the_start_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="broken"):
        pool(planned(tmp_path, "raise ValueError('broken')", ""))


@pytest.mark.parametrize("action", [KILLED, EXIT, "raise OSError('server not reached')", "raise MemoryError"])
def test_replacement_that_fails_to_load_is_started_again(tmp_path: Path, action: str) -> None:
    notes: list[str] = []
    with pool(planned(tmp_path, "", action, action)) as opened:
        opened.notify_of_restarts(notes.append)
        rewards, _ = opened.score([group("x"), group("a"), group("b")], {})
    assert [totals(rows) for rows in rewards] == [[None], [1], [1]]
    assert "SIGKILL" in str(rewards[0][0].failure)
    assert len(notes) == 2
    assert all(note.startswith("reward.functions: loading the functions failed (") for note in notes)
    assert notes[0].endswith("; trying again in 0.01 s")


def test_replacement_that_never_loads_stops_the_run(tmp_path: Path) -> None:
    notes: list[str] = []
    with pool(planned(tmp_path, "", *[KILLED] * 4, "")) as opened:
        opened.notify_of_restarts(notes.append)
        with pytest.raises(
            RunError, match=r"replaced, but loading the functions failed in 4 tries .*SIGKILL.*resume=True"
        ):
            opened.score([group("x"), group("a")], {})
    assert len(notes) == 3


def test_load_that_hangs_is_started_again(tmp_path: Path) -> None:
    notes: list[str] = []
    with pool(planned(tmp_path, "", "time.sleep(1000)")) as opened:
        opened.notify_of_restarts(notes.append)
        hangs = opened._workers.replace(opened._workers.members[0])
        while (tmp_path / "plan").read_text():
            time.sleep(0.01)
        hangs.load_by = 0.0
        assert totals(opened.score([group("a")], {})[0][0]) == [1]
    assert "it takes longer than" in notes[0]


def test_pause_does_not_delay_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.rollout.workers.worker_set.PAUSES", (1000.0,))
    with pool(planned(tmp_path, "", "", KILLED), workers=2) as opened:
        rewards, _ = opened.score([group("x"), *(group("a") for _ in range(5))], {})
    assert [totals(rows) for rows in rewards] == [[None], *[[1]] * 5]


def test_environment_is_loaded_again(tmp_path: Path) -> None:
    settings = Environment(name=f"{planned(tmp_path, KILLED, '', EXIT, '')}:World", workers=1)
    environments = ProcessEnvironments(settings, [], None, NullProgress())
    notes: list[str] = []
    environments.notify_of_restarts(notes.append)
    plays = [EnvironmentHandle(number, {}, 1) for number in range(2)]
    try:
        assert environments.answer(plays, lambda: None) == [Answer(("hello",))] * 2
        for play, text in zip(plays, "xa", strict=True):
            play.texts.append(text)
        died, well = environments.answer(plays, lambda: None)
    finally:
        environments.close()
    assert "SIGKILL" in str(died.failure)
    assert well == Answer(("well",))
    assert len(notes) == 1
    assert notes[0].startswith("environment.name: loading the class failed (its process died (exit code 3)")


def test_environment_that_never_loads_names_its_own_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"environment.name: loading the class failed: .*see environment.log"):
        ProcessEnvironments(
            Environment(name=f"{planned(tmp_path, *[KILLED] * 4)}:World", workers=1), [], None, NullProgress()
        )
    monkeypatch.setattr("gruppo.rollout.workers.process.LOAD_TIMEOUT", 0.1)
    settings = Environment(name=f"{planned(tmp_path, 'time.sleep(1000)')}:World", workers=1)
    with pytest.raises(UsageError, match="it takes longer than") as caught:
        ProcessEnvironments(settings, [], None, NullProgress())
    assert "reward" not in str(caught.value)


def test_run_records_failed_loads_and_saves_before_it_stops(tiny_folder: str, tmp_path: Path) -> None:
    from tests.small_runs import ROWS, fingerprint, recipe

    reward = Path(planned(tmp_path, "", *[KILLED] * 4))
    reward.write_text(CODE.replace('completions[0] == "x"', '_["trainer_state"].global_step == 2'))
    changes = {"run__checkpoint_every": 4, "reward__functions": [f"{reward}:f"], "reward__workers": 1}
    settings = recipe(tiny_folder, run__steps=4, **changes)
    with pytest.raises(RunError, match="failed in 4 tries"):
        train(settings, prompts=ROWS, out=tmp_path / "run")
    events = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "worker_restarted"]
    assert [event["step"] for event in events] == [3] * len(PAUSES)
    reward.write_text("def f(completions, **_): return [1.0] * len(completions)\n")
    train(settings, prompts=ROWS, out=tmp_path / "run", resume=True)
    assert "continued after step 2" in (tmp_path / "run" / "events.jsonl").read_text()
    train(settings, prompts=ROWS, out=tmp_path / "whole")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
