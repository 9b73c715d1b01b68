"""Records everything that a run reports: in its files, on the console, and in status.json."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from gruppo.runs.folder import RunFolder
from gruppo.runs.status import StatusFile
from gruppo.runs.warnings import WarningMonitor
from gruppo.utils.progress import Advance, Progress


class Sink(Protocol):
    """Receives what a run reports."""

    def step(self, values: Mapping[str, Any]) -> None:
        """A line of metrics: of a step, an evaluation, or the start of an iteration."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Something that the user should know: `kind`, `message`, `step`, and details."""

    def progress(self, phase: str, done: float, total: float | None, unit: str) -> None:
        """Progress of a phase."""


class FileSink:
    """metrics.jsonl and events.jsonl of the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def step(self, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self.folder.metric(values)

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self.folder.event(**event)

    def progress(self, phase: str, done: float, total: float | None, unit: str) -> None:
        """See `Sink`. Files do not keep it."""


class StatusSink:
    """status.json of the run folder."""

    def __init__(self, file: StatusFile) -> None:
        self.file = file

    def step(self, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self.file.update(step=int(values["step"]))

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Sink`. The status does not keep it."""

    def progress(self, phase: str, done: float, total: float | None, unit: str) -> None:
        """See `Sink`."""
        self.file.update(phase=phase, done=done, total=total, unit=unit)


class Recorder:
    """Records steps, events and progress in every sink, and shows them on the console. It is the `Progress` of a run.

    `monitor`: sees every line of metrics; its warnings become events and notes. What a thread reports inside `held` is
    recorded later, by `release`.
    """

    def __init__(self, console: Progress, sinks: Sequence[Sink], monitor: WarningMonitor | None = None) -> None:
        self.console, self.sinks, self.monitor = console, list(sinks), monitor
        self._of_thread = threading.local()

    @contextmanager
    def held(self, moved: Advance = lambda _: None) -> Iterator[list[dict[str, Any]]]:
        """Keep the events and notes of this thread back inside the block, and show none of its progress, which `moved`
        is called with. Yields what is kept, in order: plain values, for JSON."""
        self._of_thread.kept = kept = list[dict[str, Any]]()
        self._of_thread.moved = moved
        try:
            yield kept
        finally:
            self._of_thread.kept = None

    def release(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Record events and notes that were held."""
        for entry in kept:
            if "note" in entry:
                self.note(entry["note"])
            else:
                self.event(**entry)

    @property
    def _kept(self) -> list[dict[str, Any]] | None:
        return getattr(self._of_thread, "kept", None)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Record a line of metrics, and the warnings that it triggers."""
        for sink in self.sinks:
            sink.step(metrics)
        self.console.step(metrics)
        for warning in self.monitor.see(metrics) if self.monitor else ():
            state = "passed" if warning.passed else "begins"
            details = {"warning": warning.name, "state": state, "evidence": warning.evidence, "link": warning.link}
            self.event("warning", warning.message, warning.step, **details)
            title = warning.name.replace("_", " ")
            text = " has passed" if warning.passed else f": {warning.message}; see {warning.link}"
            self.note(f"Step {warning.step}: warning ({title}){text}")

    def see_again(self, metrics: Mapping[str, Any]) -> None:
        """Show the monitor a line that is already recorded; its warnings are recorded too."""
        if self.monitor is not None:
            self.monitor.see(metrics)

    def event(self, kind: str, message: str, step: int, **details: Any) -> None:
        """Record an event; the console does not show it."""
        event = {"kind": kind, "message": message, "step": step, **details}
        if self._kept is not None:
            self._kept.append(event)
            return
        for sink in self.sinks:
            sink.event(event)

    def note(self, text: str) -> None:
        """Show a line of text."""
        if self._kept is None:
            self.console.note(text)
        else:
            self._kept.append({"note": text})

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See `Progress`."""
        if self._kept is not None:
            yield self._of_thread.moved
            return
        done = 0.0
        self._progress(label, 0.0, total, unit)
        with self.console.bar(label, total, unit) as show:

            def advance(amount: float) -> None:
                nonlocal done
                done += amount
                show(amount)
                self._progress(label, done, total, unit)

            yield advance

    def _progress(self, phase: str, done: float, total: float | None, unit: str) -> None:
        for sink in self.sinks:
            sink.progress(phase, done, total, unit)
