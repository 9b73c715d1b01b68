"""Everything that must be equal in two equal runs, to the last bit, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gruppo.rollout.sampled_step import FILE as AHEAD
from gruppo.rollout.sampled_step import SAMPLED
from gruppo.runs.reading import read_lines, read_table

TIMES = ("time/", "memory/")  # metrics that differ between any two runs
RESUMED = frozenset({"resume", "changed"})  # events of a run that was continued

# What differs between runs with engines of which one lost some: times, and the weights that an engine has at the end of
# a step, older ones or none (-1) while it is being replaced.
OF_LOSSES = ("engine/idle_share", "engine/load_seconds", *(f"engine/{number}/version" for number in range(4)))
LOSSES = frozenset(  # events
    {"engine_lost", "engine_back", "rank_lost", "reward_host_lost", "reward_host_back", "waiting"}
)


def outcome(out: Path, unequal: tuple[str, ...] = (), events: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Everything that must be equal in two equal runs, by name.

    Files are compared byte by byte. Times, memory, positions in files that contain times, and resume events are left
    out. `unequal`: beginnings of further metrics that may differ. `events`: further kinds of events that may.
    """
    contents: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() or path.name.startswith(".")):
        name = str(path.relative_to(out))
        if path.name == AHEAD:
            contents[name] = _sampled_steps(path, events)
        elif path.suffix in {".safetensors", ".parquet"} or ".writing" in name or path.name.startswith("."):
            contents[name] = path.read_bytes() if path.is_file() else ""
        elif path.name == "state.json":
            contents[name] = without(json.loads(path.read_text()), {"train_seconds", "peak_memory_bytes", "lengths"})
        elif path.name == "manifest.json":
            contents[name] = without(json.loads(path.read_text()), {"state.json", AHEAD})
    contents["summary.json"] = without(
        json.loads((out / "summary.json").read_text()), {"train_seconds", "peak_memory_bytes"}
    )
    for number, line in enumerate(read_lines(out / "metrics.jsonl")):
        contents[f"metrics.jsonl, line {number + 1}"] = {
            name: value for name, value in line.items() if not name.startswith(TIMES + unequal)
        }
    kept = [event for event in read_lines(out / "events.jsonl") if event["kind"] not in RESUMED | events]
    contents["events.jsonl"] = [without(event, {"time"}) for event in kept]
    return contents


def _sampled_steps(path: Path, events: frozenset[str]) -> list[dict[str, Any]]:
    """The steps that a checkpoint keeps, without the seconds that their sampling took."""
    rows = read_table(path, SAMPLED).to_pylist()
    for row in rows:
        row["report"] = row["report"] and _report(json.loads(row["report"]), events)
    return rows


def _report(report: dict[str, Any], events: frozenset[str]) -> dict[str, Any]:
    """What is reported of a step. A note repeats the event before it."""
    dropped = [entry["message"] for entry in report["kept"] if entry.get("kind") in events]
    report["kept"] = [
        entry
        for entry in report["kept"]
        if entry.get("kind") not in events and not any(entry.get("note", "").endswith(message) for message in dropped)
    ]
    return without(report, {"seconds"})


def without(content: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def differences(got: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs between two outcomes, one message per name."""
    return [
        f"{name} {'is missing' if name not in got else 'is unexpected' if name not in expected else 'differs'}"
        for name in sorted({*got, *expected})
        if (name in got) != (name in expected) or got[name] != expected[name]
    ]
