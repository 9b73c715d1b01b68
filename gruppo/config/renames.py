"""Names that changed after revision 790d39a: recipe fields, their values, and names in run folders.

A recipe that uses an old name is refused, and the message gives the new one. Run folders of older versions are read
through these tables, so they resume, export, reproduce and evaluate as before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from gruppo.config.inheritance import inherits

# (table, old field) -> new field
FIELDS = {
    ("method", "right"): "success_threshold",
    ("method", "most_per_prompt"): "max_per_prompt",
    ("method", "distinct"): "deduplicate",
    ("method", "pair_beta"): "dpo_beta",
    ("method", "refill_rounds"): "dynamic_sampling_rounds",
    ("method", "importance_cap"): "tis_cap",
    ("reward_model", "history"): "replay_fraction",
    ("reward_model", "history_capacity"): "replay_capacity",
}
# (table, field) -> {old value: new value}
GRADERS = {"number": "numeric_answer", "math": "math_answer"}
REWARDS = {"number": "last_number", "math": "math_verify"}
VALUES = {
    ("method", "source"): {"live": "policy", "frozen": "initial", "rows": "dataset"},
    ("evaluation", "grader"): GRADERS,
    ("benchmarks", "grader"): GRADERS,
    ("reward", "functions"): REWARDS,
    ("audit", "function"): REWARDS,
}
PREFIX = ("given:", "in-memory:")  # old and new prefix of objects passed from Python

METRICS = {
    "groups/with_signal": "groups/nonzero_advantage",
    "reward/abstained": "reward/excluded",
    "audit/abstained": "audit/excluded",
    "pair/loss": "dpo/loss",
    "pair/margin": "dpo/margin",
    "pair/accuracy": "dpo/accuracy",
}
FIGURES = {"ended_share": "finished_share", "disagreement_share": "ambiguous_share"}  # figures of evaluations
EVENTS = {
    "abstention": "reward_failed",
    "no_signal": "no_nonzero_advantage",
    "refill_exhausted": "dynamic_sampling_exhausted",
    "grading": "ambiguous_answer",
}
WARNINGS = {"no_signal": "no_nonzero_advantage"}
COLUMNS = {"exam": "eval_set"}  # columns of Parquet tables
RESULTS = {"exams": "sets"}  # keys of results.json
COMMANDS = {"repeat": "rerun-reward", "replay": "reproduce"}


def new_field(table: str, field: str) -> str | None:
    """The new name of a field; None if it was not renamed."""
    return FIELDS.get((table, field))


def new_value(table: str, field: str, value: Any) -> str | None:
    """The new name of a field's value; None if it was not renamed."""
    return VALUES.get((table, field), {}).get(value) if isinstance(value, str) else None


def translate_recipe(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of an older run folder with the current names; a recipe that already has them is unchanged."""
    recipe = copy.deepcopy(dict(data))
    for (table, old), new in FIELDS.items():
        if isinstance(recipe.get(table), dict) and old in recipe[table]:
            recipe[table][new] = recipe[table].pop(old)
    for (table, field), values in VALUES.items():
        for section in recipe[table] if isinstance(recipe.get(table), list) else [recipe.get(table)]:
            if isinstance(section, dict) and field in section:
                section[field] = _translated(section[field], values)
    reward = recipe.get("reward")
    if isinstance(reward, dict) and isinstance(reward.get("options"), dict):
        reward["options"] = {REWARDS.get(name, name): options for name, options in reward["options"].items()}
    return {table: _in_memory(content) for table, content in _as_before(recipe).items()}


def _as_before(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the rules of versions that had no fields for them: evaluation tasks inherited nothing, and rows
    were held out by their finished prompts. It is changed only where that makes a difference.
    """
    for table in [recipe.get("evaluation"), *_tables(recipe.get("benchmarks"))]:
        if isinstance(table, dict) and "inherit" not in table and inherits(recipe, table):
            table["inherit"] = False
    evaluation = recipe.get("evaluation")
    asked = [table.get("task") for table in (evaluation, *_tables(recipe.get("benchmarks"))) if isinstance(table, dict)]
    for task in [recipe.get("task"), *_tables(recipe.get("mixture")), *asked]:
        if isinstance(task, dict) and task.get("held_out") and {"template", "system"} & task.keys():
            task.setdefault("held_out_by", "prompt")
    return recipe


def _tables(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _translated(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_translated(item, values) for item in value]
    return values.get(value, value) if isinstance(value, str) else value


def _in_memory(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_memory(item) for item in value]
    if isinstance(value, dict):
        return {_in_memory(name): _in_memory(item) for name, item in value.items()}
    old, new = PREFIX
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def renamed_parts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Old name -> new name of the reward parts that were renamed: built-in functions that the recipe uses."""
    reward = recipe.get("reward")
    functions = reward.get("functions") if isinstance(reward, dict) else None
    return {old: new for old, new in REWARDS.items() if isinstance(functions, list) and old in functions}


def translate_metrics(line: Mapping[str, Any], parts: Mapping[str, str]) -> dict[str, Any]:
    """A line of metrics with the current names; `parts`: see `renamed_parts`."""
    return {_metric(name, parts): value for name, value in line.items()}


def _metric(name: str, parts: Mapping[str, str]) -> str:
    if name in METRICS:
        return METRICS[name]
    head, *rest = name.split("/")
    if head == "reward" and len(rest) == 2 and rest[0] in parts:
        return "/".join((head, parts[rest[0]], rest[1]))
    if head == "eval" and rest and rest[-1] in FIGURES:
        return "/".join((head, *rest[:-1], FIGURES[rest[-1]]))
    return name


def translate_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """A line of events with the current names."""
    kind, warning = event.get("kind"), event.get("warning")
    translated = {**event, "kind": EVENTS.get(kind, kind) if isinstance(kind, str) else kind}
    if kind == "warning" and isinstance(warning, str):
        translated["warning"] = WARNINGS.get(warning, warning)
    return {COLUMNS.get(name, name): value for name, value in translated.items()}
