"""Hosts that die or hang: the results are those of this machine, and what has happened is said once, in one line."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from gruppo.config.sections import Environment
from gruppo.errors import RunError
from gruppo.rollout.environments.client import Answer, EnvironmentHandle, ProcessEnvironments, open_environments
from gruppo.rollout.hosts import hosts as hosts_module
from gruppo.rollout.hosts.hosts import Hosts
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.types import Completion, Prompt
from gruppo.utils.progress import NullProgress
from tests.rollout.hosts.conftest import MakeHosts
from tests.rollout.workers.test_rewards import group

FUNCTIONS = "tests/rollout/hosts/functions.py"
WAYS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
PATIENCE = 5.0

Events = list[tuple[str, str]]


@pytest.fixture
def two(open_new: MakeHosts) -> tuple[Hosts, Events]:
    """Two hosts, and what they notify of."""
    hosts, events = open_new(patience=PATIENCE), []
    hosts.notify = lambda kind, message: events.append((kind, message))
    return hosts, events


class Gate:
    """Lets calls wait. Once one is under way on a host, `advance` does something to that host, and opens the gate."""

    def __init__(self, folder: Path, hosts: Hosts, number: signal.Signals) -> None:
        self.folder, self.hosts, self.number, self.done = folder, hosts, number, False

    def advance(self, _: float = 0.0) -> None:
        busy = {int(path.name.rpartition("-")[2]) for path in self.folder.glob("*-*")}
        for member in self.hosts.members:
            if not self.done and member.host and busy & of(member.host.hello.pid):
                self.done = True
                os.kill(member.host.hello.pid, self.number)
                (self.folder / "open").touch()


def of(pid: int) -> set[int]:
    """The processes that a host has started."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def kill(hosts: Hosts, number: int = 0, signal_: signal.Signals = signal.SIGKILL) -> None:
    member = hosts.members[number]
    assert member.host is not None
    os.kill(member.host.hello.pid, signal_)


def groups(gate: Path) -> list[tuple[Prompt, list[Completion]]]:
    return [group(text, text * 2, gate=str(gate)) for text in ("a", "bb", "ccc", "dddd")]


def pool(hosts: Hosts | None, name: str, columns: list[str], **options: Any) -> RewardPool:
    launcher = None if hosts is None else hosts.launcher(options.get("log"))
    options = {"timeout": 60.0, "workers": 1, **options}
    return RewardPool([f"{FUNCTIONS}:{name}"], [], columns, launcher=launcher, **options)


def only_lost(events: Events, phase: str, way: str) -> None:
    """One host was lost, and is back if it had to be."""
    (lost, message), *rest = events
    assert lost == "reward_host_lost"
    assert [kind for kind, _ in rest] in ([], ["reward_host_back"])
    cause = "its process was killed or crashed" if way == "killed" else r"silent for [5-9] s \(cluster.patience\)"
    assert re.match(rf"reward host [01] \(process \d+ on \S+\): {cause}", message), message
    calls = "the calls that it was computing go to another one" if phase == "scoring" else "no call is lost"
    assert message.endswith(f"{calls}, and a new host takes its place")
    assert "it held" in message
    assert "\n" not in message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", ["scoring", "loading", "idle"])
def test_a_host_that_is_lost_changes_nothing(
    two: tuple[Hosts, Events], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, way: str
) -> None:
    hosts, events = two
    (gate := tmp_path / "gate").mkdir()
    number = WAYS[way]
    attack = Gate(gate, hosts, number)
    if phase == "loading":
        monkeypatch.setenv("GATE_OF_IMPORT", str(gate))

    class Shows(NullProgress):
        def bar(self, label: str, total: float | None, unit: str) -> Any:
            return nullcontext(attack.advance)

    options: dict[str, Any] = {"environment": ["GATE_OF_IMPORT"], "log": tmp_path / "rewards.log"}
    with pool(hosts, "length", ["gate"], progress=Shows(), **options) as opened:
        if phase == "idle":
            attack.done = True
            kill(hosts, 0, number)
            hosts.wait_until(lambda: hosts.members[0].starts == 2)
            (gate / "open").touch()
        found = opened.score(groups(gate), {}, attack.advance)
    assert attack.done
    hosts.report()
    only_lost(events, phase, way)
    with pool(None, "length", ["gate"], environment=["GATE_OF_IMPORT"]) as here:
        assert here.score(groups(gate), {}) == found
    hosts.close()
    printed = (tmp_path / "rewards.log").read_text()
    assert all(f"scored {text}" in printed for text in ("a", "bb", "ccc", "dddd")), printed


@pytest.mark.parametrize("way", WAYS)
def test_environments_of_a_lost_host_are_rebuilt(two: tuple[Hosts, Events], tmp_path: Path, way: str) -> None:
    hosts, events = two
    attack = Gate(tmp_path, hosts, WAYS[way])
    settings = Environment(name=f"{FUNCTIONS}:Counts", workers=2, seconds=60.0)
    environments = ProcessEnvironments(settings, [], None, NullProgress(), hosts.launcher(None))
    plays = [EnvironmentHandle(number, {"gate": str(tmp_path)}, 1) for number in range(6)]
    try:
        assert environments.answer(plays, lambda: None) == [Answer(("begin",))] * 6
        for text, answer in (("ab", "2"), ("wait", "6"), ("c", "7")):
            for play in plays:
                play.texts.append(text)
            assert environments.answer(plays, attack.advance) == [Answer((answer,))] * 6
        assert [answer.reward for answer in environments.end(plays, lambda: None)] == [7.0] * 6
    finally:
        environments.close()
    assert attack.done
    only_lost(events, "scoring", way)


def test_a_slow_call_is_no_dead_host(two: tuple[Hosts, Events]) -> None:
    """reward.timeout ends it, also if it is shorter or longer than cluster.patience."""
    hosts, events = two
    for timeout in (1.0, PATIENCE + 2):
        with pool(hosts, "slow", [], timeout=timeout) as opened:
            (slow,), (fast,) = opened.score([group("slow"), group("fast")], {})[0]
        assert slow.failure == "slow: took longer than reward.timeout allows"
        assert fast.total == 1.0
    hosts.report()
    assert events == []


def test_a_call_of_a_silent_host_has_not_timed_out(two: tuple[Hosts, Events], tmp_path: Path) -> None:
    """Its host was stopped, and not the function."""
    hosts, events = two
    attack = Gate(tmp_path, hosts, signal.SIGSTOP)
    with pool(hosts, "length", ["gate"], timeout=PATIENCE / 2) as opened:
        rewards, _ = opened.score(groups(tmp_path), {}, attack.advance)
    assert [[reward.total for reward in rows] for rows in rewards] == [[1, 2], [2, 4], [3, 6], [4, 8]]
    only_lost(events, "scoring", "stopped")


def test_a_call_that_ends_its_host_again_and_again_fails(two: tuple[Hosts, Events]) -> None:
    hosts, events = two
    with pool(hosts, "ends_its_host", []) as opened:
        (bad,), (good,) = opened.score([group("poison"), group("a")], {})[0]
    assert re.match(r"ends_its_host: its process was lost 3 times; the last time: its process was", str(bad.failure))
    assert good.total == 1.0
    hosts.report()
    assert [kind for kind, _ in events].count("reward_host_lost") == 3


def test_a_death_between_two_calls_does_not_fail_the_next(two: tuple[Hosts, Events]) -> None:
    """The call is sent before the news of the death arrives."""
    hosts, events = two
    with pool(hosts, "slow", []) as opened, opened.begin([group("a")[0]], {}) as scoring:
        assert opened.score([group("a")], {})[0][0][0].total == 1.0
        scoring.add(0, group("a")[1])
        with hosts.lock:
            for member in hosts.members:
                assert member.host is not None
                (supervisor,) = psutil.Process(member.host.hello.pid).children()
                supervisor.children()[0].kill()
                while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
            scoring.turn()
            assert any(process.calling for member in hosts.members for process in member.processes.values())
        assert scoring.finish()[0][0][0].total == 1.0
    hosts.report()
    assert events == []


def test_a_host_that_ends_again_and_again_ends_the_run(two: tuple[Hosts, Events]) -> None:
    hosts, events = two
    for number in range(1, 4):
        hosts.wait_until(lambda: hosts.members[0].ready)
        kill(hosts)
        if number < 3:
            hosts.wait_until(lambda number=number: hosts.members[0].starts > number)  # type: ignore[misc]
    with pytest.raises(RunError, match=r"reward host 0 \(.*\) has ended 3 times without answering a call; the last"):
        hosts.wait_until(lambda: False)
    assert [kind for kind, _ in events].count("reward_host_lost") == 2


def test_without_hosts_the_run_ends_after_a_while(
    two: tuple[Hosts, Events], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No machine has room for the hosts that take the place of those that died."""
    hosts, _ = two
    hosts.patience = 2.0
    monkeypatch.setattr(hosts_module, "START_SECONDS", 2.0)
    monkeypatch.setattr("gruppo.rollout.hosts.member.ACTOR_CPUS", 1000)
    with pool(hosts, "length", ["gate"]) as opened:
        kill(hosts, 0)
        kill(hosts, 1)
        with pytest.raises(RunError, match=r"cluster.reward_hosts = 2: no host has been there for [2-9] s .*; resume"):
            opened.score(groups(tmp_path), {})


def test_sandboxes_of_a_lost_host_are_rebuilt(two: tuple[Hosts, Events]) -> None:
    hosts, events = two
    settings = Environment(name="python", workers=1, seconds=30.0)
    environments = open_environments(settings, [], None, NullProgress(), elsewhere=hosts)
    plays = [EnvironmentHandle(number, {}, 1) for number in range(4)]

    def say(code: str, tick: Callable[[], None] = lambda: None) -> list[str]:
        for play in plays:
            play.texts.append(f"```python\n{code}\n```\n")
        return [str((answer.observations or [""])[0]) for answer in environments.answer(plays, tick)]

    def kill_once() -> None:
        nonlocal killed
        if hosts.members[0].blocks and not killed:
            kill(hosts)
            killed = True

    killed = False
    try:
        assert say("x = 20") == ["```output\n```\n"] * 4
        assert say("import time; time.sleep(1); x += 1; print(x)", kill_once) == ["```output\n21\n```\n"] * 4
        assert say("x * 2") == ["```output\n42\n```\n"] * 4
    finally:
        environments.close()
    assert killed
    only_lost(events, "scoring", "killed")
