"""Progress on the console: bars with rates and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gruppo.errors import UsageError
from gruppo.utils.progress import Advance, NullProgress, visible
from gruppo.utils.progress import Progress as ProgressProtocol

QUIET_SECONDS = 10.0
_BRIEF = {"Sampling", "Rewarding", "Updating", "Saving"}


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{rate:,.4g} {unit}/s" if rate and unit else "")


class ConsoleProgress:
    """See `gruppo.utils.progress.Progress`. Bars go to standard error, results to standard output."""

    def __init__(self) -> None:
        self.output = Console(highlight=False, soft_wrap=True, emoji=False)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See `Progress`."""
        if not self.console.is_terminal:
            with self._lines(label, total, unit) as advance:
                yield advance
            return
        if not self._open:
            self._bars.start()
        self._open += 1
        task = self._bars.add_task(visible(label), total=total, unit=unit)
        try:
            yield lambda amount: self._bars.update(task, advance=amount)
        finally:
            self._bars.remove_task(task)
            self._open -= 1
            if not self._open:
                self._bars.stop()

    @contextmanager
    def _lines(self, label: str, total: float | None, unit: str) -> Iterator[Advance]:
        """A line every ten seconds of a long phase, and one at its end."""
        if label in _BRIEF:
            yield lambda _: None
            return
        start = shown = time.monotonic()
        done = 0.0

        def advance(amount: float) -> None:
            nonlocal shown, done
            done += amount
            now = time.monotonic()
            if now - shown >= QUIET_SECONDS:
                shown = now
                rate = done / (now - start)
                left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
                of = f" of {total:,.0f}" if total else ""
                self.note(f"{label}: {done:,.0f}{of} {unit}, {rate:,.4g} {unit}/s{left}")

        yield advance
        if time.monotonic() - start >= 1:
            amount = f" {done:,.0f} {unit}" if unit else ""
            self.note(f"{label}:{amount} in {time.monotonic() - start:.1f} s")

    def note(self, text: str) -> None:
        """See `Progress`."""
        self.console.print(visible(text), markup=False)

    def result(self, text: str) -> None:
        """Lines of plain text that were asked for, on standard output."""
        self.output.print(visible(text), markup=False)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A line a step, or for an evaluation."""
        self.result(_step_line(metrics))
        self.output.file.flush()


def choose_progress(progress: bool | ProgressProtocol) -> ProgressProtocol:
    """The argument `progress` of public functions: True shows progress on the console, False shows nothing."""
    if isinstance(progress, bool):
        return ConsoleProgress() if progress else NullProgress()
    if not all(callable(getattr(progress, name, None)) for name in ("bar", "note", "step")):
        raise UsageError(f"progress = {progress!r}: give True, False, or an object with bar, note and step")
    return progress


def _step_line(m: Mapping[str, Any]) -> str:
    if exams := [
        name.removesuffix("/accuracy") for name in m if name.startswith("eval/") and name.endswith("/accuracy")
    ]:
        held = [
            f"{exam.removeprefix('eval').strip('/') or 'held-out'} accuracy {m[exam + '/accuracy']:.1%} (95 % interval "
            f"{m[exam + '/accuracy_low']:.1%} to {m[exam + '/accuracy_high']:.1%})"
            for exam in exams
        ]
        return f"step {m['step']:>4}  " + ", ".join(held)
    if "iteration" in m:
        told = f"step {m['step']:>4}  iteration {m['iteration']} begins"
        if "reward_model/loss" not in m:
            return told
        auc = " -> ".join(_number(m.get(f"reward_model/{when}/auc"), ".3f") for when in ("before", "after"))
        return (
            f"{told}; reward model: loss {_number(m['reward_model/loss'], '.3f')}, held-out AUC {auc}, "
            f"{m['reward_model/new']:.0f} new samples and {m['reward_model/replayed']:.0f} replayed"
        )
    parts = [
        f"step {m['step']:>4}",
        f"reward {_number(m.get('reward/mean'), '.3f')}",
        f"signal {_number(m.get('groups/nonzero_advantage'), '.0%')} of groups",
        f"length {_number(m.get('completion/length'), '.1f')}",
        f"entropy {_number(m.get('policy/entropy'), '.2f')}",
    ]
    if "policy/kl" in m:
        parts.append(f"KL {_number(m['policy/kl'], '.4f')}")
    parts.append(f"gradient {_number(m.get('optimizer/gradient_norm'), '.2f')}")
    parts.append(f"{m['time/step']:.1f} s ({_number(m.get('time/tokens_per_second'), '.0f')} tokens/s)")
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
