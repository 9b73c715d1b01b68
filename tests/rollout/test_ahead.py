"""`Ahead` with made-up sources, engines and weights: which weights sample which step, and what is kept in memory."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gruppo.rollout.ahead import Ahead
from gruppo.rollout.sampled_step import SampledStep
from gruppo.rollout.source import Step
from gruppo.runs.recorder import Recorder
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils import waiting
from gruppo.utils.progress import NullProgress
from gruppo.utils.signals import Interrupted, Stop
from gruppo.utils.waiting import Wait, WatchedProgress

pytestmark = pytest.mark.usefixtures("quick_workers")

STEPS = 8


@dataclass
class Weights:
    """Weights that are only a number: the version."""

    version: int = 0

    def take_weights(self, source: Weights) -> None:
        self.version = source.version

    def weight_source(self) -> Weights:
        return self


@dataclass
class SlowEngine:
    delays: random.Random
    holds: int = -1
    loads: list[int] = field(default_factory=list)

    def load_weights(self, source: Weights, version: int) -> None:
        assert source.version == version, "the engine gets the weights of the version that it is told"
        self.holds = version
        self.loads.append(version)


@dataclass
class SlowSource:
    """A step has as many groups as its number, so that the cursor depends on the steps before."""

    engine: SlowEngine
    stop: Stop
    failing: int = 0
    seen: list[tuple[int, int, str]] = field(default_factory=list)

    def collect(self, step: Step) -> list[Group]:
        self.seen.append((step.number, step.cursor, threading.current_thread().name))
        if step.number == self.failing:
            raise ValueError("the reward is broken")
        before = self.engine.holds
        for _ in range(self.engine.delays.randrange(4)):
            self.stop.check()
            time.sleep(0.002)
        assert self.engine.holds == before, "nothing is loaded while a step is sampled"
        step.metrics.mean("made/up", step.number)
        with step.timer("generate"):
            completion = Completion((1,), (-0.5,), (True,), "stop", before, "a")
        return [Group(Prompt("p", "p", (1,), "t", {}), [completion], [Reward(0.0, {})]) for _ in range(step.number)]


class Kept(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def make(lag: int, seed: int = 0, copies: int | None = None, **source: Any) -> SimpleNamespace:
    delays, live, halt = random.Random(seed), Weights(), Stop()
    engine, console = SlowEngine(delays), Kept()
    made = SlowSource(engine, halt, **source)
    spare = [Weights() for _ in range(max(0, lag - 1) if copies is None else copies)]
    ahead = Ahead(made, engine, live, lag, STEPS, Recorder(console, []), Stop(), halt, spare)  # type: ignore[arg-type]
    return SimpleNamespace(ahead=ahead, engine=engine, live=live, source=made, delays=delays, console=console)


@contextmanager
def ending(run: SimpleNamespace) -> Iterator[None]:
    try:
        yield
    finally:
        run.ahead.close()
        assert "ahead" not in {thread.name for thread in threading.enumerate()}


def train(run: SimpleNamespace, first: int, last: int, cursor: int, evaluated: int = 0) -> list[list[Group]]:
    steps = []
    for number in range(first, last + 1):
        step = Step(number, cursor)
        groups = run.ahead.collect(step)
        assert step.metrics.reduce()["made/up"] == number
        steps.append(groups)
        cursor += len(groups)
        time.sleep(0.002 * run.delays.randrange(4))
        run.live.version = number
        due = bool(evaluated) and number % evaluated == 0
        run.ahead.weights_changed(number, offered=not due)
        if due:
            with run.ahead.engine_with_live_weights():
                assert run.engine.holds == number
                time.sleep(0.003)
                assert run.engine.holds == number, "nothing else is sampled meanwhile"
    return steps


def versions(steps: list[list[Group]]) -> list[set[int]]:
    return [{group.completions[0].policy_version for group in groups} for groups in steps]


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("evaluated", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_sampled_by_the_version_that_the_lag_says(lag: int, evaluated: int, seed: int) -> None:
    run = make(lag, seed)
    with ending(run):
        run.ahead.begin(0, [])
        steps = train(run, 1, STEPS, 0, evaluated)
    assert versions(steps) == [{max(0, step - 1 - lag)} for step in range(1, STEPS + 1)]
    assert [(step, cursor) for step, cursor, _ in run.source.seen] == [(n, n * (n - 1) // 2) for n in range(1, 9)]
    assert {name for *_, name in run.source.seen} == {"ahead" if lag else "MainThread"}


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_a_resumed_run_samples_from_the_version_that_it_begins_with(lag: int) -> None:
    """The steps that the checkpoint keeps come as they are; the next ones are sampled as if nothing had happened."""
    run = make(lag)
    with ending(run):
        run.ahead.begin(0, [])
        train(run, 1, 4, 0)
        saved = run.ahead.sampled_after(4)
    assert [step.number for step in saved] == list(range(5, 5 + lag))
    again = make(lag, seed=7)
    with ending(again):
        again.live.version = 4
        again.ahead.begin(4, saved)
        assert [step.number for step in again.ahead.sampled_after(4)] == [step.number for step in saved]
        steps = train(again, 5, STEPS, 10)
    assert versions(steps) == [{step - 1 - lag} for step in range(5, STEPS + 1)]
    assert again.source.seen[0][:2] == (5 + lag, sum(range(5 + lag)))


def test_a_run_that_is_extended_begins_to_sample_anew() -> None:
    run = make(lag=2)
    with ending(run):
        run.live.version = 5
        run.ahead.begin(5, [])
        steps = train(run, 6, STEPS, 0)
    assert versions(steps) == [{5}, {5}, {5}]


def test_a_checkpoint_before_the_first_step_keeps_nothing() -> None:
    run = make(lag=2)
    run.ahead.begin(0, [])
    assert run.ahead.sampled_after(0) == []


def test_an_error_of_the_thread_ends_the_run() -> None:
    run = make(lag=2, failing=4)
    with ending(run):
        run.ahead.begin(0, [])
        with pytest.raises(ValueError, match="the reward is broken"):
            train(run, 1, STEPS, 0)
        with pytest.raises(ValueError, match="the reward is broken"):  # no checkpoint without the step
            run.ahead.sampled_after(3)


def test_what_the_thread_reports_comes_with_its_step() -> None:
    """And before the error that ends it."""
    run = make(lag=1, failing=3)
    collect = run.source.collect

    def reporting(step: Step) -> list[Group]:
        run.ahead.recorder.note(f"sampling {step.number}")
        return collect(step)

    run.source.collect = reporting
    with ending(run):
        run.ahead.begin(0, [])
        run.ahead.collect(Step(1, 0))
        assert run.console.notes == ["sampling 1"]
        run.ahead.weights_changed(0)
        run.live.version = 1
        run.ahead.weights_changed(1)
        with pytest.raises(ValueError, match="the reward is broken"):
            train(run, 2, 3, 1)
    assert run.console.notes == ["sampling 1", "sampling 2", "sampling 3"][: len(run.console.notes)]
    assert run.console.notes[-1] == "sampling 3"


def test_a_stop_request_ends_the_waiting_and_not_the_sampling() -> None:
    """The run is saved with the steps that are being sampled."""
    run, go = make(lag=1), threading.Event()
    collect = run.source.collect
    run.source.collect = lambda step: go.wait(30) and collect(step)
    with ending(run):
        run.ahead.begin(0, [])
        run.ahead.stop.requested = True
        with pytest.raises(Interrupted):
            run.ahead.collect(Step(1, 0))
        run.ahead.stop.requested = False
        go.set()
        assert len(run.ahead.collect(Step(1, 0))) == 1


def test_closing_ends_a_step_under_way() -> None:
    run, begun = make(lag=1), threading.Event()

    def endless(step: Step) -> list[Group]:
        begun.set()
        while True:
            run.source.stop.check()
            time.sleep(0.001)

    run.source.collect = endless
    with ending(run):
        run.ahead.begin(0, [])
        run.ahead._start(0)
        assert begun.wait(30)


def test_restored_steps_count_for_the_cursor() -> None:
    run = make(lag=1)
    groups = [Group(Prompt("p", "p", (1,), "t", {}), [], []) for _ in range(3)]
    with ending(run):
        run.live.version = 2
        run.ahead.begin(2, [SampledStep(3, groups)])
        assert run.ahead.collect(Step(3, 10)) == groups
        run.live.version = 3
        run.ahead.weights_changed(3)
        run.ahead.collect(Step(4, 13))
    assert run.source.seen[0][:2] == (4, 13)


class CountsCasts(TorchDispatchMode):
    """Counts how often a matrix of 7 x 5 is cast."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_to_copy" in str(function) and args[0].shape == (7, 5)
        return function(*args, **(kwargs or {}))


def test_the_thread_leaves_the_casts_of_the_trainer() -> None:
    """torch clears the casts of all threads where autocast ends in any of them."""
    run = make(lag=1)
    weight, rows = torch.nn.Parameter(torch.ones(7, 5)), torch.ones(3, 5)
    collect = run.source.collect

    def computing(step: Step) -> list[Group]:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
        return collect(step)

    run.source.collect = computing
    with ending(run), CountsCasts() as casts, torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(rows, weight)
        run.ahead.begin(0, [])
        run.ahead.collect(Step(1, 0))
        torch.nn.functional.linear(rows, weight)
    assert casts.count == 1


def test_waiting_goes_on_while_the_thread_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait is reported when nothing moves on, and not because sampling takes long."""
    monkeypatch.setattr("gruppo.rollout.ahead.TICK_SECONDS", 0.01)
    run, seen = make(lag=1), threading.Event()
    run.ahead.recorder.console = WatchedProgress(NullProgress())
    collect = run.source.collect

    def sampling(step: Step) -> list[Group]:
        with run.ahead.recorder.bar("Sampling", None, "tokens") as advance:
            for _ in range(3000):
                advance(1)
                if seen.wait(0.01):
                    break
        return collect(step)

    def look() -> None:
        first: dict[Wait, float] = {}
        while not seen.is_set():
            for wait in [wait for wait in list(waiting._open) if "the samples of step 1" in wait.what]:
                if wait.since > first.setdefault(wait, wait.since):
                    seen.set()

    run.source.collect = sampling
    watcher = threading.Thread(target=look, daemon=True)
    with ending(run):
        run.ahead.begin(0, [])
        watcher.start()
        run.ahead.collect(Step(1, 0))
        assert seen.is_set()
