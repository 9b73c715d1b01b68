"""status.json, the heartbeat of a run: what its process is doing, and when it last said so.

A reader compares `heartbeat` with the clock to tell a run that is alive from one that died without a word. `attempt`
counts the times the run was started or resumed. A resume cuts metrics.jsonl and events.jsonl back to the checkpoint
that it continues from; `cut_back_to` holds the bytes that were left of each. So a reader that follows those files
begins them again from the start when `attempt` changes.
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


@dataclass(frozen=True)
class Status:
    """The content of status.json. `phase`: "Sampling", "Updating", …; `done` of `total` `unit`s of it are done.
    `state`: "running", or how the run ended: "done", "stopped", "interrupted", "failed"."""

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
    cut_back_to: Mapping[str, int] = field(default_factory=dict)


class StatusFile:
    """Writes status.json. It is a convenience for readers: a disk that is full does not stop the run here."""

    def __init__(self, folder: Path, steps: int | None = None) -> None:
        self.path = folder / FILE
        before = read_status(folder)
        attempt = 1 if before is None else before.attempt + 1
        self.status = Status(steps=steps, process_id=os.getpid(), attempt=attempt)
        self._written = float("-inf")

    def update(self, now: bool = False, **changes: Any) -> None:
        """Change some fields; the file follows at most once per second, or `now`."""
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
    """The status of a run; None where there is no such file, or one that cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = read_object(path)
        known = {name: content[name] for name in Status.__dataclass_fields__ if name in content}
        status = Status(**known)
        return status if isinstance(status.attempt, int) and isinstance(status.step, int) else None
    except (OSError, ValueError, UsageError):
        return None
