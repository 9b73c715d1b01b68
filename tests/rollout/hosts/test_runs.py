"""Runs with reward hosts equal runs without, to the last bit, and leave no process behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gruppo.rollout.hosts.hosts import Hosts
from gruppo.training.api import train
from tests.engines.fleet.running import end_by_signal, started, wait_for_steps
from tests.small_runs import ROWS, fingerprint, killed, recipe, small_run

REWARD = str(Path("tests/rewards/functions.py").absolute())


def events(out: Path) -> list[dict[str, Any]]:
    """The events of a run, without times."""
    if not (out / "events.jsonl").is_file():
        return []
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


CASES: dict[str, dict[str, Any]] = {
    "plain": {"reward__functions": [f"{REWARD}:likes_letters", f"{REWARD}:logs"], "reward__weights": [1.0, 0.5]},
    "dynamic": {
        "reward__functions": [f"{REWARD}:begins_with_a_letter"],
        "method__dynamic_sampling_rounds": 2,
        "audit__function": f"{REWARD}:letters_again",
        "audit__share": 0.5,
    },
    "lag": {"cluster__lag": 1, "method__tis_cap": 2.0},
    "environment": {
        "environment__name": "tests/rollout/environments/worlds.py:Letters",
        "environment__workers": 1,
        "sampling__max_tokens": 12,
    },
    "python": {"environment__name": "python", "environment__workers": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_two_hosts_equals_the_run_without(
    running_ray: None, tiny_folder: str, tmp_path: Path, case: str
) -> None:
    small_run(tiny_folder, tmp_path / "one", **CASES[case])
    small_run(tiny_folder, tmp_path / "two", cluster__reward_hosts=2, **CASES[case])
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "one")
    assert events(tmp_path / "two") == events(tmp_path / "one")


def test_hosts_score_what_engines_are_sampling(running_ray: None, tiny_folder: str, tmp_path: Path) -> None:
    """Both use the same Ray. What the engines report of themselves depends on times."""
    small_run(tiny_folder, tmp_path / "one", cluster__engines=2, **CASES["plain"])
    small_run(tiny_folder, tmp_path / "two", cluster__engines=2, cluster__reward_hosts=2, **CASES["plain"])
    found, expected = (fingerprint(tmp_path / name) for name in ("two", "one"))
    for line in (*found["metrics"], *expected["metrics"]):
        line.pop("engine/idle_share", None)
        line.pop("engine/load_seconds", None)
    assert found == expected


def test_a_function_from_python_is_sent(running_ray: None, tiny_folder: str, tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    for name, changes in (("one", {}), ("two", {"cluster__reward_hosts": 2})):
        settings = recipe(tiny_folder, run__steps=3, **changes)
        settings["reward"].pop("functions")
        train(settings, reward=reward, prompts=ROWS, out=tmp_path / name, progress=False)
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_that_loses_a_host_equals_one_that_loses_none(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    changes = {"cluster__reward_hosts": 2, "cluster__patience": 5.0}
    small_run(tiny_folder, tmp_path / "whole", **changes)
    begin, begun = Hosts.report, 0

    def attacks(hosts: Hosts) -> None:
        nonlocal begun
        member = hosts.members[1]
        busy = any(process.calling for process in member.processes.values())
        begun += busy
        if busy and begun == 3:
            assert member.host is not None
            os.kill(member.host.hello.pid, number)
        begin(hosts)

    monkeypatch.setattr(Hosts, "report", attacks)
    small_run(tiny_folder, tmp_path / "run", **changes)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    found = [event for event in events(tmp_path / "run") if event["kind"].startswith(("reward_host", "worker"))]
    assert found[0]["kind"] == "reward_host_lost"
    assert [event["kind"] for event in found][1:] in ([], ["reward_host_back"])
    assert found[0]["step"] >= 1


def test_a_killed_run_resumes_to_the_same_numbers_with_other_hosts(
    running_ray: None, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tiny_folder, tmp_path / "whole")
    with killed(monkeypatch, "gruppo.rollout.workers.rewards.RewardPool.begin", 4):
        small_run(tiny_folder, tmp_path / "run", cluster__reward_hosts=2)
    small_run(tiny_folder, tmp_path / "run", resume=True, cluster__reward_hosts=1)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process(tiny_folder: str, tmp_path: Path, number: signal.Signals) -> None:
    """Also none that a reward has started in a session of its own. After SIGKILL, Ray's agents need a minute."""
    reward = "tests/rollout/hosts/functions.py:leaves_a_process"
    changes = {"cluster__reward_hosts": 2, "run__steps": 2000, "run__checkpoint_every": 1000}
    process = started(tiny_folder, tmp_path, reward=reward, **changes)
    wait_for_steps(tmp_path / "run", 3)
    assert process.poll() is None
    names, output = end_by_signal(process, number, tmp_path / "run")
    assert "raylet" in names
    assert "sleep" in names
    if number != signal.SIGKILL:
        assert "(raylet)" not in output


def test_a_host_without_the_file_gets_it(running_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine: the file is gone when a process loads it."""
    from gruppo.rollout.workers.rewards import RewardPool
    from tests.rollout.workers.test_rewards import group

    file = tmp_path / "mine.py"
    file.write_text("def f(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    hosts = Hosts(1, 60.0, "")
    try:
        hosts.start()
        with RewardPool([f"{file}:f"], [], [], workers=1) as here:
            launcher = hosts.launcher(None)
            launch = launcher.launch

            def removes(*arguments: Any) -> Any:
                file.unlink(missing_ok=True)
                return launch(*arguments)

            monkeypatch.setattr(launcher, "launch", removes)
            with RewardPool([f"{file}:f"], [], [], workers=1, launcher=launcher) as there:
                assert there.score([group("abc")], {}) == here.score([group("abc")], {})
                assert there.digests == here.digests
    finally:
        hosts.close()
