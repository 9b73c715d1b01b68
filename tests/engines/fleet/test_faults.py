"""Engines that die, hang or fail: nothing is lost but time, and what cannot go on says why in one line."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from ray.exceptions import ActorUnavailableError

from gruppo.actors.process import cause_of_end
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.fleet import fleet as fleet_module
from gruppo.engines.fleet.member import Member
from gruppo.engines.native.engine import NativeEngine
from gruppo.engines.resizing import ResizingEngine
from gruppo.errors import RunError, UsageError
from gruppo.models.policy import LanguageModel
from gruppo.utils.metrics import Metrics
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.waiting import WaitWatcher
from tests.conftest import make_policy
from tests.engines.fleet.conftest import MakeFleet, one_process

if TYPE_CHECKING:
    from gruppo.engines.fleet.fleet import Fleet

PARAMS = SamplingParams(1.0, 24)
REQUESTS = [Request((5, 6, 7 + number), [(number, index) for index in range(4)]) for number in range(16)]
SENDS = {"loading": "send_weights", "probing": "send_probe", "sampling": "send_piece"}
BROKEN = "tests.engines.fleet.broken:"


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    return make_policy(initializer_range=0.1)


@pytest.fixture
def fleet(open_new: MakeFleet, policy: LanguageModel) -> tuple[Fleet, list[tuple[str, str]]]:
    """Two engines with eight slots each, and what they notify of."""
    built = open_new(policy, slots=8, patience=10)
    events: list[tuple[str, str]] = []
    built.notify = lambda kind, message: events.append((kind, message))
    return built, events


def once(patch: pytest.MonkeyPatch, phase: str, before: Callable[[int], None], after: Callable[[int], None]) -> None:
    """When the next task of a phase is sent to engine 0, do something to its process before and after."""
    original, done = getattr(Member, SENDS[phase]), False

    def send(member: Member, *arguments: Any) -> None:
        nonlocal done
        if member.number or done:
            original(member, *arguments)
            return
        done = True
        assert member.hello is not None
        pid = member.hello.pid
        before(pid)
        original(member, *arguments)
        after(pid)

    patch.setattr(Member, SENDS[phase], send)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def wait_until_back(fleet: Fleet) -> None:
    """Sample until the replaced engine samples again."""
    while not all(member.ready and member.load == fleet._loads for member in fleet.members):
        fleet.generate(REQUESTS[:2], PARAMS)


@pytest.mark.parametrize("phase", ["sampling", "loading", "probing"])
@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_an_engine_that_is_lost_changes_nothing(
    fleet: tuple[Fleet, list[tuple[str, str]]],
    policy: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    way: str,
) -> None:
    """The process is stopped before it gets a task, so that it has the task for certain; then it is killed, or left to
    be found silent."""
    engines, events = fleet
    expected = engines.generate(REQUESTS, PARAMS)
    lost = engines.members[0].hello
    assert lost is not None
    once(monkeypatch, phase, stop, kill if way == "killed" else lambda pid: None)
    counted = 0.0

    def advance(tokens: float) -> None:
        nonlocal counted
        counted += tokens

    engines.load_weights(policy.weight_source(), 0)
    assert engines.generate(REQUESTS, PARAMS, advance) == expected
    assert counted == sum(len(completion.token_ids) for group in expected for completion in group)
    ((kind, message), *rest) = events
    assert kind == "engine_lost"
    assert message.startswith(f"engine 0 (process {lost.pid} on {lost.host}): ")
    cause = "killed or crashed" if way == "killed" else f"silent for 1[0-9] s while {phase}"
    assert re.search(cause, message), message
    assert ("piece that it was sampling goes to another" in message) == (phase == "sampling")
    wait_until_back(engines)
    assert [kind for kind, _ in events] == ["engine_lost", "engine_back"], rest
    assert engines.generate(REQUESTS, PARAMS) == expected
    assert not psutil.pid_exists(lost.pid)


@pytest.mark.parametrize(
    "why", ["failed to connect to all addresses; last error: …", "recvmsg:Connection reset by peer"]
)
def test_an_engine_that_ray_cannot_reach_has_a_cause_in_plain_words(why: str) -> None:
    """Ray says so before it has noticed that a machine is gone."""
    said = f"The actor is temporarily unavailable: RpcError: RPC error: {why} rpc_code: 14"
    cause = cause_of_end(ActorUnavailableError(said, b"0" * 16), None, None)
    assert cause == "it cannot be reached: its process or its machine is gone, or hangs"


def test_an_engine_that_hangs_is_named(
    fleet: tuple[Fleet, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is given up, the run says for which engine it waits."""
    told: list[str] = []
    once(monkeypatch, "sampling", stop, lambda pid: None)
    with WaitWatcher(lambda text, over: told.append(text), first=3).running(0.2):
        fleet[0].generate(REQUESTS, PARAMS)
    assert re.match(r"waiting for engine 0 \(process \d+ on .*\), which is sampling since", told[0]), told


def test_an_engine_that_dies_while_idle_is_replaced(
    fleet: tuple[Fleet, list[tuple[str, str]]], policy: LanguageModel
) -> None:
    engines, events = fleet
    expected = engines.generate(REQUESTS, PARAMS)
    for member in engines.members:  # all of them
        assert member.hello is not None
        kill(member.hello.pid)
    engines.load_weights(policy.weight_source(), 0)  # nobody is there, so nobody is waited for
    assert engines.generate(REQUESTS, PARAMS) == expected
    assert sorted(kind for kind, _ in events)[-2:] == ["engine_lost", "engine_lost"]


def test_an_engine_that_dies_again_and_again_ends_the_run(open_new: MakeFleet, policy: LanguageModel) -> None:
    engines = open_new(policy, engine=BROKEN + "Exits", engines=1)
    with pytest.raises(RunError) as caught:
        engines.generate(REQUESTS, PARAMS)
    words = str(caught.value)
    assert words.startswith("engine 0 has ended 3 times without finishing any work; the last time: its process was")
    assert words.endswith("its last words: the driver of the device is not happy")
    assert "\n" not in words
    assert len(words) < 500


def test_without_engines_the_run_ends_after_a_while(
    fleet: tuple[Fleet, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine has room for the processes that take the place of those that died."""
    engines, _ = fleet
    engines.patience = 2.0
    monkeypatch.setattr(fleet_module, "START_SECONDS", 2.0)
    for member in engines.members:
        member.gpus = 1
        assert member.hello is not None
        kill(member.hello.pid)
    with pytest.raises(RunError, match=r"cluster.engines = 2: no engine has been there for [2-9] s .*; resume with"):
        engines.generate(REQUESTS, PARAMS)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("Refuses", UsageError, "engine.memory = 1: too little"),
        ("NeverStarts", RunError, "engine 0 has ended 3 times .*; the last time: no module named so"),
    ],
)
def test_an_engine_that_does_not_start_says_why(
    open_new: MakeFleet, policy: LanguageModel, name: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_new(policy, engine=BROKEN + name, engines=1)


def test_an_engine_that_keeps_its_old_weights_ends_the_run(open_new: MakeFleet) -> None:
    policy = make_policy(seed=1)
    engines = open_new(policy, engine=BROKEN + "KeepsItsWeights")
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    policy.generation.advance()
    with pytest.raises(
        RunError, match=r"KeepsItsWeights\", number [01] does not have the weights of version 1: after 2"
    ):
        engines.load_weights(policy.weight_source(), 1)


def test_an_engine_that_runs_out_of_memory_gets_fewer_slots(open_new: MakeFleet, policy: LanguageModel) -> None:
    engines = open_new(policy, engine=BROKEN + "NeedsFewSlots", slots=2)
    expected = engines.generate(REQUESTS, PARAMS)
    sizes = BatchSizes(1024, 8)
    assert ResizingEngine(engines, sizes).generate(REQUESTS, PARAMS) == expected
    assert sizes.slots == 2


def test_a_call_that_is_left_early_leaves_nothing_behind(fleet: tuple[Fleet, list[tuple[str, str]]]) -> None:
    engines, events = fleet
    expected = engines.generate(REQUESTS, PARAMS)
    stream = engines.stream(REQUESTS, SamplingParams(1.0, 60))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engines.generate(REQUESTS, PARAMS) == expected

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engines.generate(REQUESTS, SamplingParams(1.0, 60), interrupt)
    assert engines.generate(REQUESTS, PARAMS) == expected
    assert events == []


def test_a_caller_that_takes_its_time_is_not_an_engine_that_hangs(
    fleet: tuple[Fleet, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, events = fleet
    expected = engines.generate(REQUESTS, PARAMS)
    engines.patience = 1.5
    stream = engines.stream(REQUESTS, PARAMS)
    found = [next(stream)]
    time.sleep(3)
    found += stream
    assert [group for _, group in sorted(found, key=lambda pair: pair[0])] == expected
    assert events == []


def test_metrics_of_the_engines(fleet: tuple[Fleet, list[tuple[str, str]]], policy: LanguageModel) -> None:
    engines, _ = fleet
    engines.load_weights(policy.weight_source(), 7)
    engines.generate(REQUESTS[:1], PARAMS)  # one group: one of two engines has nothing to do
    metrics = Metrics()
    engines.observe(metrics)
    values = metrics.reduce()
    assert values["engine/0/version"] == values["engine/1/version"] == 7
    assert values["engine/load_bytes"] == sum(weight.nbytes for weight in policy.weights().values())
    assert values["engine/load_seconds"] > 0
    assert values["engine/idle_share"] == pytest.approx(0.5, abs=0.05)
    engines.observe(later := Metrics())
    assert later.reduce()["engine/idle_share"] is None, "nothing was sampled since"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [8, 4, 2])
def test_pieces_of_any_size_have_the_tokens_of_one_process(find: MakeFleet, dtype: torch.dtype, groups: int) -> None:
    policy = make_policy(dtype, initializer_range=0.1)
    engines = find(policy, slots=groups * 4)
    found = engines.generate(REQUESTS, PARAMS)
    assert found == one_process(policy, REQUESTS, PARAMS, groups * 4), "the same pieces: equal to the last bit"
    alone = NativeEngine(policy, 64).generate(REQUESTS, PARAMS)
    for one, other in zip((c for group in found for c in group), (c for group in alone for c in group), strict=True):
        assert one.token_ids == other.token_ids
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-5)
