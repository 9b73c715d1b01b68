"""The text shown at the end of a run, made from the run folder alone."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gruppo.errors import UsageError
from gruppo.runs.reading import read_table, reading
from gruppo.runs.tables import ROLLOUTS

SHOWN = 3  # questions with their answers
LONGEST_PROMPT = 400  # characters of a prompt that a suggested command repeats


def describe_run(folder: Path, summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The outcome of a run as text: accuracies and related shares, answers before and after, and next commands.

    Raises UsageError if the folder is damaged.
    """
    with reading(folder, "the outcome of the run is in its summary.json"):
        return _described(folder, summary, metrics)


def _described(folder: Path, summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    ended = "Stopped by a callback" if summary["state"] == "stopped" else "Done"
    lines = ["", f"{ended}: {summary['steps']} steps, {summary['train_seconds']:.0f} s of training"]
    lines[-1] += f", peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB."
    if summary["accuracy_before"] is not None:
        lines += ["", *_evaluations(folder, summary, metrics), "", *_answers(folder, summary["steps"])]
    lines += _benchmarks(summary.get("benchmarks", {}))
    lines += [
        "",
        f"Everything is in {folder}: model/ (for transformers), metrics.jsonl, rollouts/ (every completion with reward",
        "and advantages), evaluations/ (every answer), events.jsonl, summary.json.",
        "",
        "Next:",
        f"  {sample_command(folder, summary['steps'])}",
        *_eval_command(folder),
        f"  gruppo export {shlex.quote(str(folder))} --to my-model     # a folder for the Hugging Face hub",
    ]
    return "\n".join(lines)


def sample_command(folder: Path, step: int, named: str | None = None) -> str:
    """The command that samples from the model, with a prompt and the system text of this run. `named`: how it calls the
    folder, by default by its path."""
    command = ["gruppo", "sample", named or str(folder)]
    try:
        table = read_table(folder / f"rollouts/step-{step:06d}.parquet", pa.schema([ROLLOUTS.field("prompt")]))
    except UsageError:
        return shlex.join(command)
    prompt = min((prompt for prompt in table["prompt"].to_pylist() if prompt is not None), key=len, default="")
    messages = _messages(prompt)
    if messages is None:
        options = ["--plain", "--prompt", prompt]
    elif [message.get("role") for message in messages] == ["user"]:
        options = ["--prompt", str(messages[0].get("content"))]
    elif [message.get("role") for message in messages] == ["system", "user"]:
        options = ["--system", str(messages[0].get("content")), "--prompt", str(messages[1].get("content"))]
    else:
        options = ["--messages", prompt]
    return shlex.join([*command, *(options if 0 < len(prompt) <= LONGEST_PROMPT else [])])


def _messages(prompt: str) -> list[dict[str, Any]] | None:
    """The messages of a stored prompt; None if it is text."""
    try:
        content = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    listed = isinstance(content, list) and content and all(isinstance(message, dict) for message in content)
    return content if listed else None


def _eval_command(folder: Path) -> list[str]:
    """The command that repeats the run's evaluation, if it had one."""
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    return [f"  gruppo eval {shlex.quote(str(folder))}"] if "evaluation" in recipe else []


def _evaluations(folder: Path, summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    decoding = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))["evaluation"]["decoding"]
    how = f"temperature {decoding['temperature']}" if decoding["temperature"] else "greedy"
    title = f"Held-out questions ({summary['questions']}, {how})"
    lines = [f"{title:<40} accuracy  95% interval      finished (EOS)     contain a number"]
    for values in metrics:
        if "eval/accuracy" in values:
            low, high = f"{values['eval/accuracy_low']:.1%}", f"{values['eval/accuracy_high']:.1%}"
            lines.append(
                f"  after step {values['step']:<4} {'':<22} {values['eval/accuracy']:>7.1%}  {low:>6} to {high:<6}"
                f"  {values['eval/finished_share']:>16.1%}  {values['eval/number_share']:>16.1%}"
            )
    return lines


def _benchmarks(results: Mapping[str, Any]) -> list[str]:
    """Accuracy before and after training on every benchmark."""
    lines = [""] if results else []
    for name, found in results.items():
        for when in ("before", "after"):
            if figures := found[when]:
                low, high = figures["interval"]
                title = f"{name} ({found['domain']}), {when}"
                lines.append(f"  {title:<38} {figures['accuracy']:>7.1%}  {low:>6.1%} to {high:<6.1%}")
    return lines


def _answers(folder: Path, last: int) -> list[str]:
    """The first held-out questions, with the answers of the first and of the last evaluation."""
    try:
        before, after = (read_table(folder / f"evaluations/step-{step:06d}.parquet").to_pylist() for step in (0, last))
    except UsageError as error:
        return [str(error)]
    lines = []
    firsts, lasts = (
        {row["prompt_id"]: row for row in rows if row["sample"] == 0 and not row["eval_set"]}
        for rows in (before, after)
    )
    for old, new in [(row, lasts[name]) for name, row in firsts.items() if name in lasts][:SHOWN]:
        lines.append(old["question"].strip())
        lines += [f"  {name}: {_quoted(row)}" for name, row in (("before", old), ("after ", new))]
    return lines


def _quoted(row: Mapping[str, Any]) -> str:
    text = " ".join(row["answer"].split())
    cut = " (truncated)" if row["finish_reason"] == "length" else ""
    return f"{'right' if row['correct'] else 'wrong'}  {text[:100]}{cut}"
