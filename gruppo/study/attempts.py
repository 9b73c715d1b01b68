"""attempts.json among the records of a study: everything that it started, in order, and how that ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gruppo.errors import RunError, UsageError, first_line
from gruppo.study.record_files import read_facts, write_facts
from gruppo.utils.signals import Interrupted

FILE = "attempts.json"


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """What was started: `name`, `outcome` ("started" if its process died), `message` and `seconds`."""
    path = folder / FILE
    attempts = read_facts(path).get("attempts", [])
    if not isinstance(attempts, list) or any(not isinstance(attempt, dict) for attempt in attempts):
        raise UsageError(f"{path}: is damaged; restore it from a copy, or delete it")
    return attempts


@contextmanager
def attempt(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Record that the block was started, and how it ended. It may set `outcome`."""
    record: dict[str, Any] = {"name": name, "outcome": "started", "message": "", "seconds": 0.0}
    earlier, begun = read_attempts(folder), time.monotonic()
    _write(folder, [*earlier, record])
    try:
        yield record
    except (UsageError, RunError, OSError) as error:
        record |= {"outcome": "failed", "message": first_line(error)}
        raise
    except (Interrupted, KeyboardInterrupt):
        record["outcome"] = "interrupted"
        raise
    finally:
        record["seconds"] = round(time.monotonic() - begun, 1)
        _write(folder, [*earlier, record])


def _write(folder: Path, attempts: list[dict[str, Any]]) -> None:
    write_facts(folder / FILE, {"attempts": attempts})
