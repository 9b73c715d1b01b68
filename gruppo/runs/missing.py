"""What is missing from a run folder: files that were deleted, truncated or replaced after the run wrote them.

Each description says what is lost. What a run has done is concluded from the files that are left.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gruppo.errors import UsageError
from gruppo.runs.reading import read_lines, read_object, step_of_name
from gruppo.runs.status import read_status

STEP = "completion/length"  # a metric of every step, and only of steps


def saved_step(folder: Path) -> int:
    """The step of the last checkpoint that a run saved, by its status and its summary; 0 if neither names one."""
    status = read_status(folder)
    return max(status.checkpoint if status else 0, _finished_step(folder))


def _finished_step(folder: Path) -> int:
    """The step at which a run ended by itself, by its summary; 0 if it did not."""
    with suppress(OSError, UsageError):
        summary = read_object(folder / "summary.json")
        if summary.get("state") in ("done", "stopped") and type(summary.get("steps")) is int:
            return int(summary["steps"])
    return 0


def steps_of(lines: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The lines of metrics.jsonl that belong to steps, by step."""
    return {int(line["step"]): line for line in lines if STEP in line}


def metric_problems(lines: Sequence[Mapping[str, Any]], done: int) -> list[str]:
    """Descriptions of lines that metrics.jsonl lacks, or has too many of, after `done` steps."""
    counts = Counter(int(line["step"]) for line in lines if STEP in line)
    problems = []
    if lost := set(range(1, done + 1)) - set(counts):
        problems.append(f"metrics.jsonl has no metrics of {steps_text(lost)}; they are lost")
    if foreign := {step for step, count in counts.items() if count > 1 or not 1 <= step <= done}:
        problems.append(f"metrics.jsonl has lines of {steps_text(foreign)} that this run did not write")
    return problems


def missing_parts(folder: Path, metrics: Iterable[Mapping[str, Any]] | None = None) -> list[str]:
    """Descriptions of what is missing from the folder of a run, finished or not.

    `metrics`: the lines of metrics.jsonl, if they have been read; only their steps and the names of metrics count. A
    run may write to the folder meanwhile: files are looked up in the order in which it writes them, or later.
    """
    total = _finished_step(folder)
    saved = set(_steps_in(folder / "checkpoints"))
    done = max([total, *saved, max(_steps_in(folder / "rollouts"), default=1) - 1])
    lines = read_lines(folder / "metrics.jsonl") if metrics is None else list(metrics)
    evaluated = {int(line["step"]) for line in lines if any(name.startswith("eval/") for name in line)}
    counts = Counter(int(line["step"]) for line in lines if STEP in line)
    every_step = {*range(1, done + 1), *counts}
    problems = []
    if done and not (folder / "metrics.jsonl").is_file():
        problems.append(f"metrics.jsonl is missing; the metrics of {steps_text(range(1, done + 1))} are lost")
    elif lost := every_step - counts.keys():
        problems.append(f"metrics.jsonl has no metrics of {steps_text(lost)}; they are lost")
    if twice := [step for step, count in counts.items() if count > 1]:
        problems.append(f"metrics.jsonl has several lines of {steps_text(twice)}; this run did not write them")
    if lost := every_step - set(_steps_in(folder / "rollouts")):
        problems.append(f"rollouts/ has no table of {steps_text(lost)}; those completions are lost")
    if lost := evaluated - set(_steps_in(folder / "evaluations")):
        problems.append(f"evaluations/ has no table of {steps_text(lost)}; those answers are lost")
    if total and not saved:
        problems.append("checkpoints/ is missing; the run cannot be resumed or exported")
    if total and not (folder / "model").is_dir():
        problems.append(
            "model/ is missing" + ("; resume the run to write it again, or export a checkpoint" if saved else "")
        )
    if done and (problem := environment_problem(folder)):
        problems.append(f"{problem}; the run cannot be resumed, exported or reproduced")
    if saved and (problem := base_problem(folder)):
        problems.append(f"{problem}; the run cannot be exported")
    if saved and _written_events(folder / "checkpoints") and not (folder / "events.jsonl").is_file():
        problems.append("events.jsonl is missing; its events are lost")
    return problems


def environment_problem(folder: Path) -> str | None:
    """What is missing from environment.json, which records what the run chose at its start; None if nothing is."""
    if not (folder / "environment.json").is_file():
        return "environment.json is missing"
    with suppress(OSError, UsageError):
        if "chosen" in read_object(folder / "environment.json"):
            return None
    return "environment.json is not as the run wrote it"


def base_problem(folder: Path) -> str | None:
    """What is missing from base/, the configuration and the tokenizer of the model; None if nothing is."""
    base = folder / "base"
    if not base.is_dir():
        return "base/ (config and tokenizer) is missing"
    try:
        if "model_type" not in read_object(base / "config.json"):
            return "base/config.json names no model type"
    except FileNotFoundError:
        return "base/config.json is missing"
    except (OSError, UsageError):
        return "base/config.json is damaged"
    names = [path.name for path in base.iterdir()]
    if not any(name.startswith(_TOKENIZERS) or name.endswith(_VOCABULARIES) for name in names):
        return "base/ has no vocabulary of the tokenizer (tokenizer.json)"
    return None


# Files with the vocabulary of a tokenizer, by the beginning and the end of their names.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab", "tekken", "spiece", "sentencepiece")
_VOCABULARIES = (".model", ".tiktoken", ".vocab", ".bpe", ".spm", ".py")


def _written_events(checkpoints: Path) -> int:
    """The size of events.jsonl when the newest readable checkpoint was saved."""
    for path in sorted(checkpoints.glob("step-*"), reverse=True):
        with suppress(OSError, UsageError, AttributeError, TypeError, ValueError):
            return int(read_object(path / "state.json")["lengths"].get("events.jsonl", 0))
    return 0


def _steps_in(folder: Path) -> list[int]:
    """The steps that a folder has checkpoints or tables of."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [step for name in names if (step := step_of_name(name)) is not None]


def steps_text(steps: Collection[int]) -> str:
    """Steps as text: "step 3", "steps 1 to 3 and 7"."""
    ranges: list[list[int]] = []
    for step in sorted(steps):
        if ranges and step == ranges[-1][-1] + 1:
            ranges[-1][1:] = [step]
        else:
            ranges.append([step])
    shown = [" to ".join(map(str, ends)) for ends in ranges[:5]] + (["others"] if len(ranges) > 5 else [])
    text = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return f"step{'s' if len(steps) > 1 else ''} {text}"
