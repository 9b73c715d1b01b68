"""Reward failures in a run: events, saved calls for rerun-reward, and stopping a run whose rewards are broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gruppo.errors import RunError, UsageError
from gruppo.rollout.reward_failures import (
    MOST_BYTES,
    MOST_FILES,
    failures_of,
    find_call,
    keep_call,
    read_call,
    rerun_reward,
)
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from gruppo.types import Group, Prompt, Reward
from tests.conftest import make_completion
from tests.small_runs import ROWS, fingerprint, recipe, small_run

WELL = "def f(completions, **_): return [sum('a' <= letter <= 'm' for letter in text) for text in completions]\n"
BROKEN = WELL.replace("def f(", "def good(") + (
    "def f(completions, trainer_state, **columns):\n"
    "    if trainer_state.global_step == 3: raise RuntimeError('\\x1b[2Jbroken \\ud800')\n"
    "    return good(completions)\n"
)


def test_broken_reward_stops_the_run_and_it_resumes_after_a_fix(tiny_folder: str, tmp_path: Path) -> None:
    reward, out = tmp_path / "r.py", tmp_path / "run"
    settings = recipe(tiny_folder, reward__functions=[f"{reward}:f"], run__steps=5, run__checkpoint_every=5)
    reward.write_text(BROKEN)
    with pytest.raises(RunError) as caught:
        train(settings, prompts=ROWS, out=out)
    message = str(caught.value)
    for words in ("step 4: 16 of 16 completions", "reward.failure_limit = 0.2", "f: RuntimeError: ", "line 3 of",
                  "gruppo rerun-reward ", "resume=True"):  # fmt: skip
        assert words in message
    events = [event for event in read_lines(out / "events.jsonl") if event["kind"] == "reward_failed"]
    assert [(event["step"], event["reward"], event["completions"]) for event in events] == [(4, "f", 4)] * 4
    assert len({event["prompt_id"] for event in events}) == 4
    for event in events:
        call = read_call(out / event["file"])
        assert (call["prompt_id"], call["exact"], call["step"]) == (event["prompt_id"], True, 4)
        with pytest.raises(RuntimeError, match="broken"):
            called_as(BROKEN, call)
    (again,) = {result.failure for result in rerun_reward(out / events[0]["file"])}
    assert "broken" in str(again)

    reward.write_text(WELL)
    assert rerun_reward(out / events[0]["file"])[0].failure is None
    train(settings, prompts=ROWS, out=out, resume=True)
    train(settings, prompts=ROWS, out=tmp_path / "whole")
    assert fingerprint(out) == fingerprint(tmp_path / "whole")
    events = read_lines(out / "events.jsonl")
    assert events[-1]["message"] == "continued after step 3", "the step before the failure was saved"
    kinds = [event["kind"] for event in events]
    assert kinds == ["changed", "resume"], "the step ran again, which removed its failures"
    assert list((out / "failures").iterdir()) == []


def called_as(code: str, call: dict) -> object:
    """Call the function as the documentation describes for a debugger."""
    from types import SimpleNamespace

    space: dict = {}
    exec(code, space)
    return space["f"](**call["arguments"], trainer_state=SimpleNamespace(**call["trainer_state"]))


def test_reward_that_cannot_be_loaded_again_stops_the_run_after_saving_it(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.rollout.workers.worker_set.PAUSES", (0.0, 0.0))
    reward, out = tmp_path / "r.py", tmp_path / "run"
    dies = "import os, pathlib\ndef f(completions, trainer_state, **_):\n    if trainer_state.global_step == 2:\n"
    dies += f"        pathlib.Path({str(reward)!r}).write_text('broken')\n        os._exit(1)\n"
    dies += "    return good(completions)\n"
    reward.write_text(WELL.replace("def f(", "def good(") + dies)
    settings = recipe(tiny_folder, reward__functions=[f"{reward}:f"], run__steps=4, run__checkpoint_every=4)
    with pytest.raises(RunError, match=r"in 3 tries .*fix it and continue with resume=True"):
        train(settings, prompts=ROWS, out=out)
    reward.write_text(WELL)
    train(settings, prompts=ROWS, out=out, resume=True)
    assert read_lines(out / "events.jsonl")[-1]["message"] == "continued after step 2"


def test_few_failures_are_events_and_the_run_continues(tiny_folder: str, tmp_path: Path) -> None:
    reward = tmp_path / "r.py"
    reward.write_text("def f(completions, **_): return [float('nan'), *map(float, map(len, completions[1:]))]\n")
    settings = recipe(tiny_folder, reward__functions=[f"{reward}:f"], run__steps=2, reward__failure_limit=0.25)
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    assert result.metrics[-1]["reward/excluded"] == 0.25
    events = [event for event in read_lines(result.path / "events.jsonl") if event["kind"] == "reward_failed"]
    assert [(event["step"], event["completions"]) for event in events] == [(1, 1)] * 4 + [(2, 1)] * 4
    assert {event["file"] for event in events} == {f"failures/{path.name}" for path in result.path.glob("failures/*")}
    assert rerun_reward(result.path / events[0]["file"])[0].failure == "f: returned nan"


@pytest.fixture(scope="module")
def pool():
    with RewardPool(["tests/rewards/functions.py:length", lambda completions, **_: []], [], [], workers=1) as opened:
        yield opened


def failed(pool: RewardPool, prompt: str = "q", text: str = "a", name: str = "length", **columns: object) -> Group:
    completion = make_completion([1])
    object.__setattr__(completion, "text", text)
    reward = Reward(None, {}, "why", failures={name: "why"})
    return Group(Prompt(prompt, "q", (1,), "t", columns), [completion], [reward])


def test_files_are_bounded_in_number_and_size(pool: RewardPool, tmp_path: Path) -> None:
    def keep(group: Group) -> str | None:
        return keep_call(tmp_path, 1, next(failures_of([group])), pool, {})

    large = keep(failed(pool, "large", "x" * MOST_BYTES))
    assert (tmp_path / str(large)).stat().st_size < 1000
    with pytest.raises(UsageError, match=r"not in it .* rollouts/step-000001\.parquet"):
        read_call(tmp_path / str(large))
    names = [keep(failed(pool, f"../{number}\n\0")) for number in range(MOST_FILES + 5)]
    assert names.count(None) == 6
    assert len(list((tmp_path / "failures").iterdir())) == MOST_FILES


def test_file_marks_inexact_arguments_and_functions_without_a_name(pool: RewardPool, tmp_path: Path) -> None:
    group = failed(pool, column=object())
    name = keep_call(tmp_path, 1, next(failures_of([group])), pool, {})
    assert json.loads((tmp_path / str(name)).read_text())["exact"] is False
    in_memory = keep_call(tmp_path, 2, next(failures_of([failed(pool, name="<lambda>")])), pool, {})
    with pytest.raises(UsageError, match="was passed from Python"):
        rerun_reward(tmp_path / str(in_memory))
    assert "0 values for 1" in str(rerun_reward(tmp_path / str(in_memory), lambda completions, **_: [])[0].failure)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"arguments": 3}', "[" * 10**5, "\ufffd", '{"arguments": {}}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(UsageError, match=r"f\.json: is (not a saved reward call|damaged)"):
        read_call(tmp_path / "f.json")


def test_rerun_reward_command_prints_only_printable_text(tmp_path: Path) -> None:
    reward = tmp_path / "r.py"
    reward.write_text(
        "def f(completions, **_):\n    print('\\x1b[31mseen')\n    raise RuntimeError('\\x1b[2Jbroken')\n"
    )
    with RewardPool([f"{reward}:f"], [], [], workers=1) as pool:
        name = keep_call(tmp_path, 1, next(failures_of([failed(pool, name="f")])), pool, {})
    command = [sys.executable, "-m", "gruppo.cli.main", "rerun-reward", str(tmp_path / str(name))]
    done = subprocess.run([*command, "--trust"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert r"completion 0: f: RuntimeError: \x1b[2Jbroken (line 3 of" in done.stdout
    assert r"\x1b[31mseen" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    well = subprocess.run([*command, "--function", "tests/rewards/functions.py:length"], capture_output=True, text=True)
    assert (well.returncode, well.stdout) == (0, "completion 0: 1\n")
    shutil.rmtree(tmp_path / "failures")
    gone = subprocess.run(command, capture_output=True, text=True)
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1)


CALLS = """
import random
def noisy(completions, prompts, answer, trainer_state, prompt_endings, **_):
    print(prompts[0], answer[0], trainer_state.global_step, prompt_endings[0])
    return [len(text) + random.random() for text in completions]
def plain(completions, **_):
    return [float("a" in text) for text in completions]
"""


def test_every_recorded_call_can_be_rerun(tiny_folder: str, tmp_path: Path) -> None:
    """By run, step, group and reward: with the same arguments, the same random numbers and the same output."""
    (tmp_path / "calls.py").write_text(CALLS)
    functions = [f"{tmp_path}/calls.py:noisy", f"{tmp_path}/calls.py:plain"]
    result = small_run(tiny_folder, tmp_path / "run", run__steps=2, reward__functions=functions)
    for step in (1, 2):
        rows = result.rollouts(step)
        for group in range(4):
            members = rows[rows.group == group]
            for name in ("noisy", "plain"):
                log = tmp_path / f"{step}-{group}-{name}.log"
                again = rerun_reward(result.path, log=log, step=step, group=group, reward=name)
                assert [reward.total for reward in again] == [json.loads(parts)[name] for parts in members.reward_parts]
                assert log.read_text() == json.loads(members.printed.iloc[0]).get(name, "")
    (call,) = {tuple(find_call(result.path, 2, 1, "plain")["recorded"])}
    assert len(call) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "is a run folder; name the call too"),
        ({"step": 1, "group": 0, "reward": "other"}, "reward = other: is not a reward of the run; write one of likes"),
        ({"step": 1, "group": 4}, "group = 4: step 1 has the groups 0 to 3"),
        ({"step": 9, "group": 0}, "there is no such file"),
    ],
)
def test_calls_that_were_not_recorded(arguments: dict, message: str, tiny_folder: str, tmp_path: Path) -> None:
    result = small_run(tiny_folder, tmp_path / "run", run__steps=1)
    with pytest.raises(UsageError, match=message):
        rerun_reward(result.path, **arguments)
    with pytest.raises(UsageError, match="nor the folder of a run"):
        rerun_reward(tmp_path)
