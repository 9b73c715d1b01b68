"""Steps that are sampled and scored while earlier steps train."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from gruppo.engines.base import Engine
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource
from gruppo.rollout.labels import LabelledCompletion
from gruppo.rollout.sampled_step import SampledStep
from gruppo.rollout.source import RolloutSource, Step
from gruppo.runs.recorder import Recorder
from gruppo.types import Group, Prompt
from gruppo.utils.signals import Interrupted, Stop
from gruppo.utils.waiting import moved, waiting_for

TICK_SECONDS = 0.5  # between two signs of life while the run waits
ENDING_SECONDS = 30.0  # the longest that the end of a run waits for the thread


class Ahead:
    """See `RolloutSource`. The steps of a source, with a fixed lag between sampling and training.

    Version v of the weights is those after step v. With lag k, step s is sampled, scored and
    refilled wholly from version max(b, s - 1 - k), where b is the step that this process began after (0 in a run that
    was never resumed). So what is sampled depends on no clock. With lag 0 the calls go to the source and the engine as
    they are. Else one thread samples one step after the other, because each begins at the prompts where the one before
    ended. It never waits for the trainer longer than its weights take to exist, and is never more than k steps ahead.

    The engine must hold weights of its own. They are loaded from the live ones by the caller's thread, while the engine
    waits for them. If it is still busy when the live weights are about to change, they are kept in one of `copies`, of
    which k - 1 suffice.

    `weights`: the live weights. `steps`: the last step of the run. `stop`: the run's. `halt`: what the source heeds,
    with a lag another one, because a run that stops needs the steps that it has begun to sample.
    """

    def __init__(
        self,
        source: RolloutSource,
        engine: Engine,
        weights: WeightSource,
        lag: int,
        steps: int,
        recorder: Recorder,
        stop: Stop,
        halt: Stop,
        copies: Sequence[LanguageModel] = (),
    ) -> None:
        self.source, self.engine, self.weights, self.lag, self.steps = source, engine, weights, lag, steps
        self.recorder, self.stop, self.halt = recorder, stop, halt
        self._changed = threading.Condition()  # held while anything below is read or changed
        self._unused, self._versions = list(copies), dict[int, LanguageModel]()
        self._base = self._live = self._loaded = 0  # versions: of this process's begin, of the policy, of the engine
        self._next, self._cursor = 1, 0  # the next step to sample, and the prompts sampled before it
        self._sampled: dict[int, SampledStep] = {}
        self._busy = self._paused = self._closed = False
        self._moved = 0.0  # how far sampling and scoring have come: tokens, groups
        self._failure: BaseException | None = None
        self._unreported: list[dict[str, Any]] = []  # events and notes of the step that is being sampled
        self._thread: threading.Thread | None = None

    # The run's side.

    def begin(self, step: int, sampled: Sequence[SampledStep]) -> None:
        """Continue after a step, whose weights are the live ones. `sampled`: the steps that its checkpoint keeps."""
        self._base = self._live = self._loaded = step
        self._sampled = {one.number: one for one in sampled}
        self._next = step + 1 + len(sampled)
        self.engine.load_weights(self.weights, step)
        last = min(step + self.lag, self.steps)
        if step and self._next <= last:  # the run had ended here, and is longer now
            self.recorder.event(
                "changed",
                f"steps {self._next} to {last} are sampled by the weights after step {step}: those that a run of this "
                "length from its start would have used (cluster.lag) are gone",
                step,
            )

    def collect(self, step: Step) -> list[Group]:
        """See `RolloutSource`. The live weights may change once this has returned."""
        if not self.lag:
            return self.source.collect(step)
        if self._thread is None:
            self._start(step.cursor)
        with step.timer("wait"), self.stop.interruptible():
            self._wait_for(f"Waiting for the samples of step {step.number}", lambda: step.number in self._sampled)
        with step.timer("load_weights"):
            self._keep_live()
        with self._changed:
            sampled = self._sampled.pop(step.number)
        step.metrics.add(sampled.observations)
        step.beside.update(sampled.seconds)
        self.recorder.release(sampled.kept)
        return sampled.groups

    def weights_changed(self, version: int, offered: bool = True) -> None:
        """The live weights are those of this version now. `offered`: the engine may load them at once."""
        if not self.lag:
            self.engine.load_weights(self.weights, version)
        with self._changed:
            self._live = version
            if self.lag and offered and self._awaits_live():
                self._load_live()

    @contextmanager
    def engine_with_live_weights(self) -> Iterator[None]:
        """Wait until all is sampled that can be without the live weights, and load them; nothing else is sampled inside
        the block."""
        if not self.lag:
            yield
            return
        self._wait_for("Waiting for the samples of later steps", lambda: not self._busy and not self._can_begin())
        with self._changed:
            self._paused = True
            if self._loaded != self._live:
                self._load_live()
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def sampled_after(self, step: int) -> list[SampledStep]:
        """The steps that a checkpoint of this step has to keep: those that are sampled from versions before it."""
        if not self.lag:
            return []
        numbers = range(step + 1, min(step + self.lag, self.steps) + 1)
        earlier = [number for number in numbers if self._version_of(number) < step]
        self._wait_for("Waiting for the samples to save", lambda: self._sampled.keys() >= set(earlier))
        with self._changed:
            return [self._sampled[number] for number in numbers if number in self._sampled]

    def record_failures(self, step: Step, groups: Sequence[Group]) -> list[str]:
        """See `RolloutSource`."""
        return self.source.record_failures(step, groups)

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """See `RolloutSource`. Nothing may be sampled ahead yet: the reward model has to be trained before."""
        assert self._thread is None
        return self.source.label(prompts, step, key)

    def close(self) -> None:
        """End the thread. What it is sampling is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self.halt.requested = True
            self._thread.join(ENDING_SECONDS)

    def _wait_for(self, label: str, ready: Callable[[], bool]) -> None:
        """Wait until a condition holds. Raises the error that ended the sampling, if there is one: no checkpoint could
        be saved any more."""
        with self._changed:
            if self._none_failed() and ready():
                return
        with self.recorder.bar(label, None, "") as show, self._changed:
            while self._none_failed() and not ready():
                before = self._moved
                self._changed.wait(TICK_SECONDS)
                show(0)
                if self._moved != before:  # what is waited for goes on
                    moved()

    def _none_failed(self) -> bool:
        """True; or raises the error that ended the sampling, after what was reported before it."""
        if self._failure is None:
            return True
        self.recorder.release(self._unreported)
        self._unreported.clear()
        raise self._failure

    def _keep_live(self) -> None:
        """Load the live weights into the engine if it waits for them; if it needs them later, copy them."""
        with self._changed:
            needing = self._live + 1 + self.lag
            if self._live in (self._loaded, self._base) or not self._next <= needing <= self.steps:
                return
            if self._awaits_live():
                self._load_live()
                return
            while self._none_failed() and not self._unused:  # the thread is about to load the oldest copy
                self._changed.wait()
            copy = self._unused.pop()
            copy.take_weights(self.weights)
            self._versions[self._live] = copy
            self._changed.notify_all()

    def _awaits_live(self) -> bool:
        """Whether the engine is idle and needs the live weights for the next step."""
        waits = not self._busy and self._thread is not None and self._next <= self.steps
        return waits and self._version_of(self._next) == self._live != self._loaded

    def _load_live(self) -> None:
        with waiting_for("the engine, to load weights"):
            self.engine.load_weights(self.weights, self._live)
        self._loaded = self._live
        self._changed.notify_all()

    # The thread's side.

    def _version_of(self, step: int) -> int:
        return max(self._base, step - 1 - self.lag)

    def _can_begin(self) -> bool:
        """Whether the next step can be sampled now."""
        if self._thread is None or self._paused or self._closed or self._failure or self._next > self.steps:
            return False
        version = self._version_of(self._next)
        return version == self._loaded or version in self._versions

    def _start(self, cursor: int) -> None:
        self._cursor = cursor + sum(len(step.groups) for step in self._sampled.values())
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        torch.autocast_increment_nesting()  # or each end of autocast here would clear the trainer's casts
        try:
            with suppress(Interrupted), self.recorder.held(self._move) as self._unreported:
                while self._begin_next():
                    self._sample()
        except BaseException as error:  # noqa: BLE001  of the engine, a reward or an environment; the run raises it
            with self._changed:
                self._failure, self._busy = error, False
                self._changed.notify_all()

    def _move(self, amount: float) -> None:
        self._moved += amount

    def _begin_next(self) -> bool:
        """Wait until the next step can be sampled, and load its weights. False at the end of the run."""
        with self._changed:
            while not self._can_begin():
                if self._closed:
                    return False
                self._changed.wait()
            self._busy = True
            version = self._version_of(self._next)
            copy = None if version == self._loaded else self._versions.pop(version)
        if copy is not None:
            with waiting_for("the engine, to load weights"):
                self.engine.load_weights(copy.weight_source(), version)
            with self._changed:
                self._loaded = version
                self._unused.append(copy)
                self._changed.notify_all()
        return True

    def _sample(self) -> None:
        step, kept = Step(self._next, self._cursor), self._unreported
        groups = self.source.collect(step)
        done = SampledStep(step.number, groups, step.metrics.observations(), dict(step.timer.seconds), [*kept])
        kept.clear()
        with self._changed:
            self._sampled[step.number] = done
            self._next, self._cursor, self._busy = step.number + 1, self._cursor + len(groups), False
            self._changed.notify_all()
