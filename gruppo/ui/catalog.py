"""The runs below a folder, and what one line of a list says of each."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from gruppo.config.renames import translate_event, translate_metrics, translate_recipe
from gruppo.errors import UsageError
from gruppo.runs.missing import STEP
from gruppo.runs.reading import finite_number, object_of, old_parts, open_file, read_object
from gruppo.runs.screen import State, state_of
from gruppo.runs.status import Status, read_status

DEPTH = 5  # folders below the root in which runs are looked for
MOST_RUNS, MOST_FOLDERS = 5_000, 50_000
TAIL = 2**18  # bytes at the end of metrics.jsonl that are searched for the last values
HEAD = 2**16  # bytes at its beginning, for the first evaluation
RECENT = 10  # steps whose time forecasts the rest
LONGEST_STEP = 1e8  # seconds; a longer one was not measured
SCAN_SECONDS = 2.0  # between two looks for new runs
MOST_RECIPE = 2**20  # bytes
MOST_KEPT = 256  # recipes in memory
_WATCHED = ("recipe.toml", "summary.json", "metrics.jsonl", "events.jsonl")  # and status.json, every second


@dataclass(frozen=True)
class Card:
    """What a list says of a run. `key`: names the run in addresses. `left`: seconds; None if not known.

    `pace`: seconds per step. `accuracy`, `low`, `high`: of the last evaluation on held-out questions; `before`: of the
    first. `problem`: why a part of the line is missing. `most_tokens`: sampling.max_tokens; 0 if it is the
    default or not known. `ranks`, `engines`, `hosts`, `lag`: of [cluster].
    """

    key: str
    path: Path
    name: str
    folder: str
    state: State
    method: str
    model: str
    task: str
    step: int
    steps: int
    pace: float | None
    left: float | None
    reward: float | None
    accuracy: float | None
    low: float | None
    high: float | None
    before: float | None
    warning: str
    started: str
    problem: str
    most_tokens: int = 0
    ranks: int = 1
    engines: int = 0
    hosts: int = 0
    lag: int = 0

    @property
    def share(self) -> float:
        """The share of the steps that are done, between 0 and 1."""
        return min(1.0, max(0.0, self.step / self.steps)) if self.steps > 0 else 0.0

    def values(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "key": self.key, "name": self.name, "folder": self.folder, "state": self.state.name,
            "words": self.state.words, "method": self.method, "model": self.model, "task": self.task,
            "step": self.step, "steps": self.steps, "seconds_left": self.left, "reward": self.reward,
            "accuracy": self.accuracy, "accuracy_low": self.low, "accuracy_high": self.high,
            "accuracy_before": self.before, "warning": self.warning, "started": self.started, "problem": self.problem,
        }  # fmt: skip


def run_key(relative: str) -> str:
    """A name for addresses: readable, unique, and never a path."""
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in Path(relative).name)
    return f"{name.strip('-')[:40] or 'run'}-{hashlib.sha256(os.fsencode(relative)).hexdigest()[:8]}"


class Catalog:
    """The runs in and below `root`; links that lead to other folders are not followed. Safe for several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._scanned = -math.inf
        self._cards: dict[str, tuple[Any, Card]] = {}

    def paths(self) -> dict[str, Path]:
        """Key -> folder of every run. New runs are looked for every `SCAN_SECONDS`."""
        with self._lock:
            if time.monotonic() - self._scanned > SCAN_SECONDS:
                self._paths = {run_key(os.path.relpath(path, self.root)): path for path in self._find()}
                self._scanned = time.monotonic()
            return self._paths

    def path(self, key: str) -> Path | None:
        """The folder of a run; None if there is no such run."""
        path = self.paths().get(key)
        if path is None:
            with self._lock:
                self._scanned = -math.inf  # perhaps it has just been started
            path = self.paths().get(key)
        return path

    def cards(self, now: float | None = None) -> list[Card]:
        """The runs: first those that are running, then the others, the most recent first."""
        cards = [self.card(key, path, now) for key, path in self.paths().items()]
        return sorted(cards, key=lambda card: (card.state.name == "running", card.started), reverse=True)

    def card(self, key: str, path: Path, now: float | None = None) -> Card:
        """The line of one run. Files that have not changed are not read again."""
        marks = tuple(map(_mark, (path / name for name in _WATCHED)))
        known = self._cards.get(key)
        if known is None or known[0] != marks:
            known = self._cards[key] = (marks, _card(key, path, self.root))
        status = read_status(path) if regular(path / "status.json") else None
        return known[1] if status is None else _with_status(known[1], status, now)

    def _find(self) -> Iterator[Path]:
        pending, seen, found = [(self.root, 0)], 0, 0
        while pending and seen < MOST_FOLDERS and found < MOST_RUNS:
            folder, depth = pending.pop()
            seen += 1
            try:
                with os.scandir(folder) as entries:
                    inside = list(entries)
            except OSError:
                continue
            if any(entry.name == "recipe.toml" and _is_file(entry) for entry in inside):
                if not any(entry.name == "folder.json" for entry in inside):  # labels, or a reward model
                    found += 1
                    yield Path(folder)
                continue
            if depth < DEPTH:
                pending += [
                    (Path(entry.path), depth + 1)
                    for entry in inside
                    if not entry.name.startswith(".") and _is_folder(entry)
                ]


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def regular(path: Path) -> bool:
    """Whether a file is one, and no link, device or pipe."""
    return _mark(path) is not None


def foreign_entries(run: Path) -> list[str]:
    """The names in a run folder that are neither files nor folders: links, which can lead out of it, and pipes."""
    try:
        with os.scandir(run) as entries:
            return sorted(entry.name for entry in entries if not _is_file(entry) and not _is_folder(entry))
    except OSError:
        return []


def recipe_data(run: Path) -> dict[str, Any]:
    """The tables of recipe.toml with today's names. Raises ValueError or OSError if it cannot be read."""
    path = run / "recipe.toml"
    found = _mark(path)
    if found is None or found[0] > MOST_RECIPE:
        raise ValueError("recipe.toml is missing, or too large")
    try:
        return translate_recipe(tomllib.loads(path.read_text(encoding="utf-8")))
    except (RecursionError, AttributeError, TypeError) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=MOST_KEPT)
def _recipe_data(run: Path, mark: tuple[int, int] | None) -> dict[str, Any]:
    """`recipe_data` of a recipe.toml that is as it was at `mark`."""
    return recipe_data(run)


@lru_cache(maxsize=MOST_KEPT)
def _old_parts(run: Path, mark: tuple[int, int] | None) -> dict[str, str]:
    """`old_parts` of a recipe.toml that is as it was at `mark`."""
    return old_parts(run)


def _card(key: str, path: Path, root: Path) -> Card:
    problem = ""
    try:
        data = _recipe_data(path, _mark(path / "recipe.toml"))
    except (ValueError, OSError) as error:
        data, problem = {}, f"recipe.toml: {str(error).splitlines()[0][:200] if str(error) else 'is damaged'}"
    summary = _summary(path)
    lines = _lines(path / "metrics.jsonl", path)
    steps = [line for line in lines if STEP in line]
    evaluated = [line for line in lines if isinstance(line.get("eval/accuracy"), float | int)]
    last = evaluated[-1] if evaluated else {}
    first = next((line for line in _head(path) if isinstance(line.get("eval/accuracy"), float | int)), {})
    relative = os.path.relpath(path, root)
    return Card(
        key=key,
        path=path,
        name=_text(_table(data, "run").get("name")) or path.resolve().name,
        folder=path.resolve().name if relative == "." else relative,
        state=state_of(None, summary),
        method=_text(_table(data, "method").get("name")),
        model=_text(_table(data, "model").get("name")),
        task=_tasks(data),
        step=_number(summary.get("steps")) or (_number(steps[-1].get("step")) if steps else 0),
        steps=_number(_table(data, "run").get("steps")),
        pace=_pace(steps),
        left=None,
        reward=finite_number(steps[-1].get("reward/mean")) if steps else None,
        accuracy=finite_number(last.get("eval/accuracy")),
        low=finite_number(last.get("eval/accuracy_low")),
        high=finite_number(last.get("eval/accuracy_high")),
        before=finite_number(first.get("eval/accuracy")) if first.get("step") != last.get("step") else None,
        warning=_warning(path),
        started=_started(path),
        problem=problem,
        most_tokens=_number(_table(data, "sampling").get("max_tokens")),
        ranks=max(1, _number(_table(data, "cluster").get("trainers"))),
        engines=_number(_table(data, "cluster").get("engines")),
        hosts=_number(_table(data, "cluster").get("reward_hosts")),
        lag=_number(_table(data, "cluster").get("lag")),
    )


def _with_status(card: Card, status: Status, now: float | None) -> Card:
    state, step, steps = state_of(status, {}, now), _number(status.step), _number(status.steps)
    left = None
    if state.name == "running" and steps and card.pace is not None:
        left = finite_number(card.pace * max(0, steps - step))
    return replace(card, state=state, step=step, steps=steps or card.steps, left=left)


def _table(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return value[:200] if isinstance(value, str) else ""


def _tasks(data: Mapping[str, Any]) -> str:
    parts = data.get("mixture") if isinstance(data.get("mixture"), list) else [data.get("task")]
    return ", ".join(_text(part.get("name")) for part in parts or [] if isinstance(part, dict))[:200]


def _number(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _pace(steps: list[dict[str, Any]]) -> float | None:
    known = (finite_number(line.get("time/step")) for line in steps[-RECENT:])
    times = [time for time in known if time is not None and 0 <= time <= LONGEST_STEP]
    return math.fsum(times) / len(times) if times else None


def _summary(path: Path) -> dict[str, Any]:
    if not regular(path / "summary.json"):
        return {"state": "unfinished"}
    try:
        return read_object(path / "summary.json")
    except (UsageError, OSError):
        return {"state": "unknown"}


def _started(path: Path) -> str:
    """When the run began, for sorting: the age of its first file."""
    try:
        oldest = min(mark[1] for mark in map(_mark, (path / "environment.json", path / "recipe.toml")) if mark)
    except ValueError:
        return ""
    try:
        return datetime.fromtimestamp(oldest / 1e9).isoformat(" ", "minutes")
    except (OverflowError, ValueError, OSError):
        return ""


def _lines(path: Path, run: Path) -> list[dict[str, Any]]:
    """The last complete lines of metrics.jsonl with today's names: back to the last evaluation, at least `RECENT`
    steps."""
    parts, found, steps, is_evaluated = _old_parts(run, _mark(run / "recipe.toml")), list[dict[str, Any]](), 0, False
    for content in map(object_of, reversed(_tail(path))):
        if content is not None:
            found.append(translate_metrics(content, parts))
            steps += STEP in found[-1]
            is_evaluated |= "eval/accuracy" in found[-1]
        if steps >= RECENT and is_evaluated:
            break
    return found[::-1]


def _head(run: Path) -> list[dict[str, Any]]:
    try:
        with open_file(run / "metrics.jsonl", links=False) as stream:
            lines = stream.read(HEAD).split(b"\n")[:-1]
    except OSError:
        return []
    return [content for line in lines if (content := object_of(line)) is not None]


def _tail(path: Path) -> list[bytes]:
    """The last complete lines of a file, up to `TAIL` bytes."""
    try:
        with open_file(path, links=False) as stream:
            start = max(0, os.fstat(stream.fileno()).st_size - TAIL)
            stream.seek(start)
            lines = stream.read(TAIL).split(b"\n")[:-1]
    except OSError:
        return []
    return lines[1 if start else 0 :]


def _warning(run: Path) -> str:
    """The last warning that has not passed."""
    open_warnings: dict[str, str] = {}
    for line in _tail(run / "events.jsonl"):
        event = translate_event(object_of(line) or {})
        if event.get("kind") == "warning":
            name = str(event.get("warning"))
            open_warnings.pop(name, None)
            if event.get("state") != "passed":
                open_warnings[name] = f"step {event.get('step')}: {str(event.get('message', ''))[:300]}"
    return next(reversed(open_warnings.values()), "")
