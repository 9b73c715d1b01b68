"""The process of one tracker: follows a run folder and logs what is new with accelerate's class for the tracker.

    python -m gruppo.runs.tracker_main NAME RUN_FOLDER STEP CONTROL_FD

STEP: the step that the run continues from. The trainer writes to the pipe CONTROL_FD, or closes it, when the run has
ended; the process then logs the rest and ends. It only reads what the run has written, so it cannot hold the run up.

No point is logged twice. trackers/NAME.json has, for every metric, the last step that was logged, and is written before
the tracker gets a line: a kill in between loses that line there. TensorBoard is the exception: it can drop points from
a step on, so a resume logs everything after its checkpoint again, and loses nothing.
"""

from __future__ import annotations

import os
import select
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from gruppo.config.renames import translate_metrics
from gruppo.errors import UsageError
from gruppo.runs.reading import finite_number, old_parts, read_batches
from gruppo.runs.tables import ROLLOUTS
from gruppo.runs.tail import Tail
from gruppo.runs.tracker_kinds import COLUMNS, CONFIG_IS_FINAL, TENSORBOARD, open_tracker, send_completions
from gruppo.runs.trackers import FOLDER, Sent, read_sent
from gruppo.utils.text import as_json

SECONDS = 1.0  # between two looks at the run folder
GROUPS = 4  # of a step, whose best and worst completions are the sample
MOST_TEXT = 10_000  # characters of a prompt or completion in the sample
NICENESS = 10  # the run comes first

COMPLETIONS = "completions"  # in `Sent.steps`, and the name of the table

_READ = pa.schema([ROLLOUTS.field(name) for name in ("group", *COLUMNS)])


class Follower:
    """Logs what a run folder has, and what the run adds to it, with one tracker."""

    def __init__(self, name: str, folder: Path, step: int) -> None:
        """Open the tracker, which may take long or raise anything. `step`: the run continues from it."""
        self.name, self.folder = name, folder
        self._file = folder / FOLDER / f"{name}.json"
        recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        run, before = recipe["run"], read_sent(self._file)
        self._every, self._last = run["checkpoint_every"], run["steps"]
        self.sent = before or Sent(run["name"])
        purge = max(0, min(step + 1, self.sent.last_step))  # also the step that a kill may have cut off
        if name == TENSORBOARD:
            self.sent.forget_after(purge - 1)
        self.tracker = open_tracker(name, folder / FOLDER, self.sent, purge)
        self._send_config(dict(flat(recipe)))
        parts = old_parts(folder)
        self._tail = Tail(folder / "metrics.jsonl")
        self._translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: translate_metrics(line, parts)

    def _send_config(self, config: dict[str, Any]) -> None:
        if config == self.sent.config:
            return
        if not (self.sent.config and self.name in CONFIG_IS_FINAL):
            self.tracker.store_init_configuration(config)
        self.sent.config = config
        self.sent.write(self._file)

    def follow(self, control: int) -> None:
        """Log until the run has ended, then finish."""
        ended = False
        while not ended:
            ended = bool(select.select([control], [], [], SECONDS)[0])
            self.log_new()
        self.tracker.finish()

    def log_new(self) -> None:
        """Log everything that the run has added."""
        for line in self._tail.read()[1]:
            self._log(self._translate(line))

    def _log(self, line: Mapping[str, Any]) -> None:
        step = line.get("step")
        if type(step) is not int:
            return
        values = {
            name: number
            for name, value in line.items()
            if name != "step" and step > self.sent.steps.get(name, -1) and (number := finite_number(value)) is not None
        }
        if values:
            self._once(step, values, lambda: self.tracker.log(values, step=step))
        if self._is_sampled(step) and step > self.sent.steps.get(COMPLETIONS, -1) and (rows := self._sample(step)):
            self._once(step, [COMPLETIONS], lambda: send_completions(self.name, self.tracker, rows, step))

    def _once(self, step: int, names: Any, send: Callable[[], None]) -> None:
        """Note first that these names have got the step, and then send it; unless that fails, then it is not noted."""
        before = dict(self.sent.steps)
        self.sent.steps.update(dict.fromkeys(names, step))
        self.sent.write(self._file)
        try:
            send()
        except Exception:
            self.sent.steps = before
            self.sent.write(self._file)
            raise

    def _is_sampled(self, step: int) -> bool:
        """Whether a sample of the step's completions is sent: of the first, the last, and those with a checkpoint."""
        return step in (1, self._last) or (step > 0 and step % self._every == 0)

    def _sample(self, step: int) -> list[list[Any]]:
        """See `sample`. No rows if the table is missing or damaged; the log says so."""
        try:
            return sample(self.folder / "rollouts" / f"step-{step:06d}.parquet")
        except UsageError as error:
            sys.stderr.write(f"{error}\n")
            return []


def sample(path: Path) -> list[list[Any]]:
    """The best and the worst completion of each of the first groups of a step, as rows with `COLUMNS`.

    A group without rewards gives its first completion. Raises UsageError if the table is missing or damaged.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for batch in read_batches(path, _READ):
        for row in batch.to_pylist():
            groups.setdefault(row["group"], []).append(row)
        if len(groups) > GROUPS:
            break
    return [
        [shortened(row[name]) for name in COLUMNS] for rows in list(groups.values())[:GROUPS] for row in _ends(rows)
    ]


def _ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scored = sorted((row for row in rows if finite_number(row["reward"]) is not None), key=lambda row: -row["reward"])
    return [scored[0], scored[-1]][: len(scored)] if scored else rows[:1]


def shortened(value: Any) -> Any:
    """A long text cut off, with the number of characters that are left out; any other value as it is, and null if it
    is a number that is not finite."""
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"{value[:MOST_TEXT]}… ({len(value) - MOST_TEXT} more characters)"
    return finite_number(value) if isinstance(value, float) else value


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """The fields of a recipe as `table.field` with a plain value each; lists as JSON, `mixture.0.name` for tables in a
    list."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            yield from flat({str(place): one for place, one in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, str | bool | int | float):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", as_json(value)


def main() -> None:
    """See the module."""
    name, folder, step, control = sys.argv[1:]
    os.nice(NICENESS)
    Follower(name, Path(folder), int(step)).follow(int(control))


if __name__ == "__main__":
    main()
