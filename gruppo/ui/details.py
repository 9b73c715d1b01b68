"""What the pages say of a run's recipe, machine, files and commands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import RunError, UsageError, is_visible
from gruppo.runs.changes import differences
from gruppo.runs.reading import own_table, read_object, reading, step_of_name
from gruppo.runs.screen import next_commands
from gruppo.ui.catalog import Card, recipe_data, regular

LISTED = (
    "recipe.toml", "metrics.jsonl", "events.jsonl", "summary.json", "environment.json", "results.json", "rewards.log",
)  # fmt: skip
_TABLES = ("rollouts", "evaluations")
_MOST_FILES = 400


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run. Raises UsageError if it is damaged."""
    path, fix = run / "recipe.toml", "restore it as the run wrote it"
    with reading(path, fix):
        if "extends" in recipe_data(run):
            raise UsageError(f"{path}: extends another file, which a run never writes; {fix}")
        return load_recipe(path)


def changed_fields(run: Path) -> list[tuple[str, Any, Any]]:
    """(field, value, default) of every field that differs from the default of the run's method.

    What a recipe has to name itself (model, tasks, reward functions) is not compared. Raises UsageError if the recipe
    is damaged.
    """
    recipe = read_recipe(run)
    with reading(run / "recipe.toml", "restore it as the run wrote it"):
        data = recipe_data(run)
    kept: dict[str, Any] = {
        "method": {"name": recipe.method.name},
        "model": {"name": recipe.model.name},
        **{name: data[name] for name in ("task", "mixture", "benchmarks", "environment", "audit") if name in data},
        **({"reward": {"functions": data["reward"]["functions"]}} if "functions" in data.get("reward", {}) else {}),
    }
    optional: dict[str, Any] = {name: {} for name in ("evaluation", "lora", "critic", "reward_model") if name in data}
    for extra in (optional, {}):
        try:
            default = Recipe.model_validate({**extra, **kept})
        except ValueError:
            continue
        return [
            (change.field, change.new, change.old)
            for change in differences(default, recipe)
            if change.field != "run.name"
        ]
    return []


def machine(run: Path) -> list[tuple[str, str]]:
    """What environment.json says of the machine and the versions; empty if it is missing or damaged."""
    if not regular(run / "environment.json"):
        return []
    try:
        content = read_object(run / "environment.json")
    except (UsageError, OSError):
        return []
    packages = content.get("packages")
    rows: list[tuple[str, Any]] = [
        ("platform", content.get("platform")),
        ("processor", content.get("processor")),
        ("cores", content.get("cores")),
        ("memory", _gigabytes(content.get("memory_bytes"))),
        ("accelerator", content.get("accelerator")),
        ("python", content.get("python")),
        ("git revision", content.get("git_revision")),
        *([(name, version) for name, version in packages.items()] if isinstance(packages, dict) else []),
    ]
    chosen = content.get("chosen")
    if isinstance(chosen, dict):
        rows += [(name.replace("_", " "), value) for name, value in chosen.items()]
    return [(str(name), str(value)) for name, value in rows if value is not None]


def _gigabytes(count: Any) -> str | None:
    return f"{count / 1e9:.1f} GB" if type(count) in (int, float) and 0 < count < 2**63 else None


def files(run: Path) -> dict[str, Path]:
    """The files that can be downloaded, by the name in their address: of the tables, the last ones. Links are left
    out."""
    names = list(LISTED)
    for folder in _TABLES:
        if (run / folder).is_dir():
            tables = sorted(name for name in os.listdir(run / folder) if _is_table(name))
            names += [f"{folder}/{name}" for name in tables[-_MOST_FILES:]]
    return {name: path for name in names if (path := file(run, name)) is not None}


def file(run: Path, name: str) -> Path | None:
    """A file that can be downloaded: one of those of a run's folder, or any of its tables. None for any other name, and
    for links."""
    folder, _, table = name.partition("/")
    if folder in _TABLES and _is_table(table):
        return run / name if not (run / folder).is_symlink() and regular(run / name) else None
    return run / name if name in LISTED and regular(run / name) else None


def _is_table(name: str) -> bool:
    return name.endswith(".parquet") and step_of_name(name) is not None


def commands(card: Card, last_step: int, named: str | None = None) -> list[tuple[str, str]]:
    """Commands that go on from the run: what they do, and the command. While it is running, only those that show it.

    `named`: how they call the run, by default by its path. A command with characters that a reader does not see is left
    out: nobody should paste it into a shell.
    """
    return [(words, command) for words, command in _commands(card, last_step, named) if is_visible(command)]


def _commands(card: Card, last_step: int, named: str | None) -> list[tuple[str, str]]:
    quoted = shlex.quote(named or str(card.path))
    general = [("On one screen", f"gruppo show {quoted}"), ("As one file", f"gruppo report {quoted} -o report.html")]
    try:
        recipe = read_recipe(card.path)
        own_table(card.path, "rollouts", last_step)
        found = [] if card.state.name == "running" else next_commands(card.path, recipe, card.state, last_step, named)
    except (UsageError, RunError):
        return general
    if last_step:
        found = [*found, ("Compute a step again", f"gruppo reproduce {quoted} --step {last_step}")]
    return [*found, *general]


def last_values(live: Any) -> Mapping[str, float | None]:
    """The figures at the top of a run's page."""
    names = {
        "nonzero": "groups/nonzero_advantage", "length": "completion/length", "truncated": "completion/truncated",
        "speed": "time/tokens_per_second", "step": "time/step",
    }  # fmt: skip
    return {short: live.last(name) for short, name in names.items()}
