"""The metrics and events of one run, read once and then followed as the run appends to them."""

from __future__ import annotations

import math
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gruppo.config.renames import translate_event, translate_metrics
from gruppo.runs.reading import old_parts
from gruppo.runs.tail import Tail

MOST_EVENTS = 20_000  # the last ones are kept
MOST_NAMES = 2_000  # of metrics
DIGITS = 7  # of the values of points that stand for several values
_EXACT = 22  # the largest power of ten that is exact in double precision


@dataclass
class Series:
    """One metric: its values, and the steps that they belong to. NaN: not recorded, or not finite.

    `in_order`: whether no step is smaller than the one before it.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    in_order: bool = True

    def add(self, step: int, value: float) -> None:
        """Add a value."""
        self.in_order = self.in_order and (not self.steps or self.steps[-1] <= step)
        self.steps.append(step)
        self.values.append(value)

    def arrays(self, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, without the first `start`."""
        return np.array(self.steps[start:]), np.array(self.values[start:])


class LiveRun:
    """The metrics and events of a run folder; `poll` brings them up to date. Safe to use from several threads.

    `revision` changes whenever there is something new. `generation` grows when what was read before is void, because
    the run was resumed from an earlier step or the folder was replaced. `step`: of the last line; None before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._metrics, self._events = Tail(path / "metrics.jsonl"), Tail(path / "events.jsonl")
        self.generation = self.lines = 0
        self.step: int | None = None
        self.series: dict[str, Series] = {}
        self.events: list[dict[str, Any]] = []
        self._translate: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def revision(self) -> str:
        """Names the state that `poll` saw last."""
        return f"{self.generation}.{self.lines}.{len(self.events)}"

    @property
    def damaged(self) -> int:
        """The number of lines that could not be read."""
        return self._metrics.damaged + self._events.damaged

    def poll(self) -> str:
        """Read what is new. Returns the revision."""
        with self._lock:
            void, lines = self._metrics.read()
            if void:
                self.generation += 1
                self.series, self.lines, self.step, self._translate = {}, 0, None, None
            self._add(lines)
            void, events = self._events.read()
            if void:
                self.generation += 1
                self.events = []
            kept = [_event(translate_event(event)) for event in events]
            self.events = [*self.events, *kept][-MOST_EVENTS:]
            return self.revision

    def _add(self, lines: Sequence[dict[str, Any]]) -> None:
        if lines and self._translate is None:
            parts = old_parts(self.path)
            self._translate = lambda line: translate_metrics(line, parts)
        for line in lines:
            values = self._translate(line) if self._translate else line
            step = values.get("step")
            if type(step) is not int or abs(step) > 2**53:
                self._metrics.damaged += 1
                continue
            self.lines += 1
            self.step = step
            for name, value in values.items():
                if name == "step" or (value is not None and type(value) not in (int, float)):
                    continue
                series = self.series.get(name)
                if series is None:
                    if len(self.series) >= MOST_NAMES:
                        continue
                    series = self.series[name] = Series()
                series.add(step, _finite(value))

    def names(self) -> list[str]:
        """The recorded metrics, sorted."""
        with self._lock:
            return sorted(self.series)

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if it was not recorded."""
        with self._lock:
            series = self.series.get(name)
            value = series.values[-1] if series and series.values else math.nan
        return None if math.isnan(value) else value

    def at(self, name: str, step: int) -> float | None:
        """The value of a metric at a step; None if it was not recorded."""
        with self._lock:
            series = self.series.get(name)
            place = bisect_left(series.steps, step) if series else 0
            if series is None or place == len(series.steps) or series.steps[place] != step:
                return None
            value = series.values[place]
        return None if math.isnan(value) else value

    def lines_with(self, is_wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
        """The step of every value of some metrics, with the name of the metric: a line per value, without the value."""
        for name, (steps, _) in self.arrays(filter(is_wanted, self.names())).items():
            yield from ({"step": step, name: None} for step in steps.tolist())

    def arrays(self, names: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Steps and values of those metrics that the run has."""
        with self._lock:
            return {name: self.series[name].arrays() for name in names if name in self.series}

    def rest(self, name: str, points: int, since: int) -> tuple[int, int, tuple[np.ndarray, np.ndarray]]:
        """What a page lacks that has all of a curve of at most `points` points before the step `since`.

        Returns the number of points that stay as they are, the values per point, and steps and values after those
        points: everything if the steps are not in order.
        """
        with self._lock:
            series = self.series[name]
            size = size_of(len(series.values), points)
            start = bisect_left(series.steps, since) // size if series.in_order else 0
            return start, size, series.arrays(start * size)


def _finite(value: float | None) -> float:
    try:
        number = float(value) if value is not None else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """What pages show of an event; a foreign file can contain anything under these names."""
    step = event.get("step")
    return {
        "step": step if type(step) is int and abs(step) < 2**53 else None,
        "time": str(event.get("time", ""))[:40],
        "kind": str(event.get("kind") or "event")[:80],
        "message": str(event.get("message", ""))[:2_000],
        "warning": str(event.get("warning") or "")[:80],
        "passed": event.get("state") == "passed",
    }


def size_of(count: int, points: int) -> int:
    """How many of `count` values each point of a curve of at most `points` points stands for."""
    return max(1, math.ceil(count / points)) if points > 0 else 1


def thin(steps: np.ndarray, values: np.ndarray, points: int) -> dict[str, Any]:
    """A curve of at most `points` points, see `means`."""
    return means(steps, values, size_of(len(values), points))


def means(steps: np.ndarray, values: np.ndarray, size: int) -> dict[str, Any]:
    """A curve of which every point is the mean of `size` consecutive values, the last one of what is left.

    Returns {"x": steps, "y": means, "size": size}, as lists; None for a value that is not recorded. The step of a point
    is the last one of its values. With size > 1 also "low" and "high", the extremes of the values, and `DIGITS`
    significant digits.
    """
    if size == 1:
        return {"x": steps.tolist(), "y": _plain(values), "size": 1}
    count = math.ceil(len(values) / size)
    padded = np.full(count * size, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(count, size)
    known = ~np.isnan(rows)
    number = known.sum(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.where(known, rows, 0.0).sum(axis=1)
        middle = np.where(number > 0, sums / np.maximum(number, 1), np.nan)
    low = np.where(number > 0, np.where(known, rows, np.inf).min(axis=1), np.nan)
    high = np.where(number > 0, np.where(known, rows, -np.inf).max(axis=1), np.nan)
    ends = steps[np.minimum(np.arange(1, count + 1) * size, len(steps)) - 1]
    return {
        "x": ends.tolist(), "y": _plain(rounded(middle)), "low": _plain(rounded(low)), "high": _plain(rounded(high)),
        "size": size,
    }  # fmt: skip


def rounded(values: np.ndarray) -> np.ndarray:
    """The values with `DIGITS` significant digits: half the text of a page, and half the time to write it.

    Values that are 0, not finite, or so large or small that they have no exact power of ten stay as they are.
    """
    with np.errstate(divide="ignore"):
        places = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
    is_usual = np.abs(places) <= _EXACT
    scale = 10.0 ** np.where(is_usual, np.abs(places), 0.0)
    usual = np.where(is_usual, values, 0.0)
    found = np.where(places >= 0, np.round(usual * scale) / scale, np.round(usual / scale) * scale)
    return np.where(is_usual, found, values)


def _plain(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
