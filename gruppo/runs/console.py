"""Progress on the console: bars with rates and remaining time on a terminal, plain lines otherwise."""

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
_BRIEF = {"Sampling", "Scoring", "Updating", "Saving"}


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{rate:,.4g} {unit}/s" if rate and unit else "")


class ConsoleProgress:
    """See `gruppo.utils.progress.Progress`. Bars and notes go to standard error, results to standard output."""

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
        """One line every ten seconds of a long phase, and one at its end."""
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
        """Print the requested output as plain text to standard output."""
        self.output.print(visible(text), markup=False)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Print one line per step or evaluation."""
        self.result(_step_line(metrics))
        self.output.file.flush()


def choose_progress(progress: bool | ProgressProtocol) -> ProgressProtocol:
    """The Progress for the argument `progress` of public functions: True for the console, False for none.

    Raises UsageError if the argument is neither a bool nor an object with the methods of Progress.
    """
    if isinstance(progress, bool):
        return ConsoleProgress() if progress else NullProgress()
    if not all(callable(getattr(progress, name, None)) for name in ("bar", "note", "step")):
        raise UsageError(f"progress = {progress!r}: must be True, False, or an object with bar, note and step")
    return progress


def _step_line(m: Mapping[str, Any]) -> str:
    """The metrics of a step, an evaluation or the start of an iteration as one line."""
    if eval_sets := [
        name.removesuffix("/accuracy") for name in m if name.startswith("eval/") and name.endswith("/accuracy")
    ]:
        accuracies = [
            f"{name.removeprefix('eval').strip('/') or 'held-out'} accuracy {m[name + '/accuracy']:.1%} (95% interval "
            f"{m[name + '/accuracy_low']:.1%} to {m[name + '/accuracy_high']:.1%})"
            for name in eval_sets
        ]
        return f"step {m['step']:>4}  " + ", ".join(accuracies)
    if "iteration" in m:
        line = f"step {m['step']:>4}  iteration {m['iteration']} starts"
        if "reward_model/loss" not in m:
            return line
        auc = " -> ".join(_number(m.get(f"reward_model/{when}/auc"), ".3f") for when in ("before", "after"))
        return (
            f"{line}; reward model: loss {_number(m['reward_model/loss'], '.3f')}, held-out AUC {auc}, "
            f"{m['reward_model/new']:.0f} new samples and {m['reward_model/replayed']:.0f} replayed"
        )
    parts = [
        f"step {m['step']:>4}",
        f"reward {_number(m.get('reward/mean'), '.3f')}",
        f"nonzero advantage {_number(m.get('groups/nonzero_advantage'), '.0%')}",
        f"length {_number(m.get('completion/length'), '.1f')}",
        f"entropy {_number(m.get('policy/entropy'), '.2f')}",
    ]
    if "policy/kl" in m:
        parts.append(f"KL {_number(m['policy/kl'], '.4f')}")
    parts.append(f"gradient norm {_number(m.get('optimizer/gradient_norm'), '.2f')}")
    parts.append(f"{m['time/step']:.1f} s ({_number(m.get('time/tokens_per_second'), '.0f')} tokens/s)")
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
