"""`gruppo show RUN`: a run as one screen of text, finished or not, from its folder alone."""

from __future__ import annotations

import math
import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.runs.reading import read_lines, reading
from gruppo.runs.report import sample_command
from gruppo.runs.results import Result
from gruppo.runs.status import Status, read_status
from gruppo.utils.timing import duration_text

SILENT_SECONDS = 60.0  # without a heartbeat, after which a run counts as dead
LEVELS = "▁▂▃▄▅▆▇█"
WIDTH, COLUMNS = 40, 80  # of a curve, and of the screen
LONGEST = 300  # characters of an event's message
RECENT = 10  # steps whose time forecasts the rest
WARNINGS = 4  # of the most recent events
_QUIET = frozenset({"resume", "changed"})  # events that need no attention

ACCURACY = ("eval/accuracy", "held-out accuracy", ".1%")
# Metrics that are shown if the run has them: name, its words, and the format of a value.
ROWS = (
    ("reward/mean", "reward", ".3f"),
    ("groups/nonzero_advantage", "nonzero advantage", ".0%"),
    ("completion/length", "length in tokens", ".1f"),
    ("completion/truncated", "truncated", ".0%"),
    ("policy/entropy", "entropy", ".3f"),
    ("policy/kl", "KL", ".4f"),
    ("loss/total", "loss", ".4f"),
    ("optimizer/gradient_norm", "gradient norm", ".3f"),
    ("time/tokens_per_second", "tokens per second", ",.0f"),
    ("time/step", "seconds per step", ".1f"),
)


@dataclass(frozen=True)
class State:
    """What a run is doing. `name`: "running", "done", "stopped", "interrupted", "failed", or "silent" if it says that
    it is running, but has not written a heartbeat for `SILENT_SECONDS`. `words`: the same for a reader."""

    name: str
    words: str


def state_of(status: Status | None, summary: Mapping[str, Any], now: float | None = None) -> State:
    """The state of a run, from its status.json and summary.json. `now`: seconds since 1970."""
    if status is None:
        name = str(summary.get("state", "unknown"))
        return State(name, name)
    where = f"step {status.step} of {status.steps}" if status.steps else f"step {status.step}"
    if status.state != "running":
        return State(status.state, f"{status.state} after {where}")
    silent = _age(status.heartbeat, time.time() if now is None else now)
    if silent > SILENT_SECONDS:
        return State("silent", f"no sign of life since {status.heartbeat} ({duration_text(silent)} ago), at {where}")
    total = f" of {status.total:,.0f}" if status.total else ""
    doing = f"{status.phase} {status.done:,.0f}{total} {status.unit}".strip() if status.unit else status.phase
    of = f" of {status.steps}" if status.steps else ""
    return State("running", f"running, {status.step}{of} steps done; {doing}")


def _age(heartbeat: str, now: float) -> float:
    try:
        moment = datetime.fromisoformat(heartbeat)
    except ValueError:
        return math.inf
    return max(0.0, now - moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())


def sparkline(values: Sequence[float | None], width: int = WIDTH) -> str:
    """A curve of block characters, at most `width` wide: means of consecutive values, from the lowest to the highest.

    A space stands for values that are missing or not finite; equal values are all in the middle.
    """
    means = downsampled(values, width)
    known = [mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if low == high:
        return "".join(" " if mean is None else LEVELS[3] for mean in means)
    span = high / 2 - low / 2  # halves, because the difference of huge values is infinite
    return "".join(
        " " if mean is None else LEVELS[min(7, int((mean / 2 - low / 2) / span * len(LEVELS)))] for mean in means
    )


def downsampled(values: Sequence[float | None], most: int) -> list[float | None]:
    """At most `most` means of consecutive values; None where all are missing or not finite."""
    size = max(1, math.ceil(len(values) / most))
    parts = [[v for v in values[start : start + size] if v is not None and math.isfinite(v)]
             for start in range(0, len(values), size)]  # fmt: skip
    return [math.fsum(part) / len(part) if part else None for part in parts]


def show(folder: str | Path, now: float | None = None) -> str:
    """A run as a screen of text of 80 columns: what it is, its state, its curves, its last warnings, and what to do
    next.

    `now`: seconds since 1970, for the state of a running run. Raises UsageError if the folder contains no run.
    """
    result = Result.read(folder)
    with reading(result.path, "restore the folder as the run wrote it"):
        recipe, status = load_recipe(result.path / "recipe.toml"), read_status(result.path)
        state = state_of(status, result.summary, now)
        steps = [line for line in result.metrics if "completion/length" in line]
        lines = [
            f"{recipe.run.name}: {recipe.method.name} of {recipe.model.name} on "
            f"{', '.join(task.name for task in recipe.tasks)}",
            state.words + _time_left(state, status, steps),
            *_accuracies(result.metrics),
            "",
            *_curves(steps, [line for line in result.metrics if ACCURACY[0] in line]),
            *_warnings(read_lines(result.path / "events.jsonl")),
            *_next(result.path, recipe, state, int(steps[-1]["step"]) if steps else 0),
        ]
    return "\n".join(lines)


def _time_left(state: State, status: Status | None, steps: Sequence[Mapping[str, Any]]) -> str:
    times = [line["time/step"] for line in steps[-RECENT:] if isinstance(line.get("time/step"), int | float)]
    if state.name != "running" or status is None or not status.steps or not times:
        return ""
    return f"; about {duration_text(math.fsum(times) / len(times) * (status.steps - status.step))} left"


def _accuracies(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Held-out accuracy at the first and the last evaluation, with the interval of the last one."""
    found = [line for line in metrics if isinstance(line.get("eval/accuracy"), int | float)]
    if not found:
        return []
    first, last = found[0], found[-1]
    before = "" if len(found) == 1 else f"{first['eval/accuracy']:.1%} -> "
    interval = f"95% interval {last['eval/accuracy_low']:.1%} to {last['eval/accuracy_high']:.1%}"
    return [f"held-out accuracy {before}{last['eval/accuracy']:.1%} after step {last['step']} ({interval})"]


def _curves(steps: Sequence[Mapping[str, Any]], evaluated: Sequence[Mapping[str, Any]]) -> list[str]:
    if not steps:
        return ["No step is done yet."]
    title = f"steps {steps[0]['step']} to {steps[-1]['step']}" if len(steps) > 1 else f"step {steps[0]['step']}"
    lines = [f"{'':<18} {'first':>9} {'last':>9}  {title}"]
    for name, words, form in (ACCURACY, *ROWS):
        values = [line.get(name) for line in (evaluated if name == ACCURACY[0] else steps)]
        if all(value is None for value in values):
            continue
        ends = ("-" if value is None else format(value, form) for value in (values[0], values[-1]))
        lines.append(f"{words:<18} {next(ends):>9} {next(ends):>9}  {sparkline(values)}")
    return lines


def _warnings(events: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [event for event in events if event.get("kind") not in _QUIET]
    if not told:
        return []
    more = f" (the last {WARNINGS} of {len(told)})" if len(told) > WARNINGS else ""
    lines = ["", f"Events{more}:"]
    for event in told[-WARNINGS:]:
        text = f"step {event.get('step', '?')}, {event.get('kind')}: {str(event.get('message', ''))[:LONGEST]}"
        lines += textwrap.wrap(text, COLUMNS, initial_indent="  ", subsequent_indent="    ")
    return lines


def _next(folder: Path, recipe: Recipe, state: State, step: int) -> list[str]:
    if state.name == "running":
        return []
    return ["", "Next:", *(f"  {command}" for _, command in next_commands(folder, recipe, state, step))]


def next_commands(
    folder: Path, recipe: Recipe, state: State, step: int, named: str | None = None
) -> list[tuple[str, str]]:
    """What can be done with a run, and the command that does it. `step`: the last step with rollouts; 0 if there is
    none. A run that has not ended by itself can be resumed. `named`: how commands call the folder, by default by its
    path."""
    place = named or str(folder)
    quoted = shlex.quote(place)
    if state.name not in ("done", "stopped"):
        return [("Resume", f"gruppo train {shlex.quote(f'{place}/recipe.toml')} --out {quoted} --resume")]
    return [
        ("Sample from the model", sample_command(folder, step, named)),
        *([("Evaluate it", f"gruppo eval {quoted}")] if recipe.evaluation is not None else []),
        ("Export it", f"gruppo export {quoted} --to my-model"),
    ]
