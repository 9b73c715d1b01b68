"""status.json, the heartbeat of a run: what its process is doing, and when it last wrote this file.

A reader compares `heartbeat` with the clock to tell a live run from one that died. `attempt` counts how often the run
was started or resumed. A resume truncates metrics.jsonl and events.jsonl to the checkpoint that it continues from, and
`truncated_to` has the remaining size of each in bytes. A reader that follows those files reads them again from the
start when `attempt` changes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gruppo.errors import UsageError
from gruppo.runs.atomic import publish
from gruppo.runs.reading import read_object

FILE = "status.json"
SECONDS = 1.0  # the file is written at most this often
_MOST = 2**53  # of every number


@dataclass(frozen=True)
class Status:
    """The content of status.json.

    `state`: "running", or how the run ended: "done", "stopped", "interrupted" or "failed". `phase`: "Sampling",
    "Updating", …; `done` of its `total` units are done, and `unit` names them. `heartbeat`: time of the last write, UTC
    in ISO 8601. `checkpoint`: step of the last checkpoint that the run saved. `truncated_to`: file name -> bytes that
    the last resume kept.
    """

    state: str = "running"
    phase: str = "Starting"
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    step: int = 0
    steps: int | None = None
    process_id: int = 0
    heartbeat: str = ""
    attempt: int = 1
    checkpoint: int = 0
    truncated_to: Mapping[str, int] = field(default_factory=dict)


class StatusFile:
    """Writes status.json for readers of the run folder. A full disk does not stop the run here."""

    def __init__(self, folder: Path, steps: int | None = None) -> None:
        self.path = folder / FILE
        before = read_status(folder)
        attempt, checkpoint = (1, 0) if before is None else (before.attempt + 1, before.checkpoint)
        self.status = Status(steps=steps, process_id=os.getpid(), attempt=attempt, checkpoint=checkpoint)
        self._written = float("-inf")

    def update(self, now: bool = False, **changes: Any) -> None:
        """Change some fields. The file is written at most once per second, or `now`."""
        self.status = replace(self.status, **changes)
        if not now and time.monotonic() - self._written < SECONDS:
            return
        self._written = time.monotonic()
        self.status = replace(self.status, heartbeat=datetime.now(UTC).isoformat(timespec="milliseconds"))
        temporary = self.path.with_name(f"{FILE}.writing")
        try:
            temporary.write_text(json.dumps(asdict(self.status), indent=1), encoding="utf-8")
            publish(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)


def read_status(folder: Path) -> Status | None:
    """The status of a run. None if the file is missing, or cannot be read as one."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = read_object(path)
        known = {name: content[name] for name in Status.__dataclass_fields__ if name in content}
        status = Status(**known)
        return status if _is_valid(status) else None
    except (OSError, ValueError, UsageError):
        return None


def _is_valid(status: Status) -> bool:
    """Whether the fields have the types that a run writes; a damaged or foreign file can contain anything."""
    whole = (status.step, 0 if status.steps is None else status.steps, status.attempt, status.checkpoint)
    amounts = (status.done, 0 if status.total is None else status.total)
    return (
        all(isinstance(text, str) for text in (status.state, status.phase, status.unit, status.heartbeat))
        and all(type(number) is int and abs(number) < _MOST for number in whole)
        and all(type(number) in (int, float) and abs(number) < _MOST for number in amounts)
        and isinstance(status.truncated_to, Mapping)
    )
