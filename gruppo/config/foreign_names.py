"""What the names of other trainers (TRL, verl, OpenRLHF, Unsloth, LLaMA-Factory) mean in a recipe.

An unknown field with one of the names of the table is answered with gruppo's field, or with the reason why gruppo has
none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gruppo.config.foreign_table import CLIP, IGNORED, MISSING, NAMES, OTHER_MODELS, STEP

_REASONS = [(pattern, reason) for table in (IGNORED, MISSING) for reason, names in table.items()
            for pattern in names.split()]  # fmt: skip
_OF_OTHER_MODELS = [(pattern, reason) for pattern, reason in _REASONS if pattern in OTHER_MODELS]

NOTHING = "nothing: "
"""The start of an answer that gives the reason why gruppo has no such field."""

# What fields mean in the tables of a value model, a reward model and an evaluation, which have fields of their own.
_IN_TABLE = {
    "critic": {"model.name": "critic.name", "optimizer.learning_rate": "critic.learning_rate", CLIP: "critic.clip"},
    "reward_model": {
        "model.name": "reward_model.name",
        "optimizer.learning_rate": "reward_model.learning_rate",
        "run.epochs": "reward_model.epochs",
        "run.seed": "reward_model.seed",
        STEP: "reward_model.batch_size",
    },
    "evaluation": {
        "sampling.group_size": "evaluation.samples",
        "sampling.max_tokens": "evaluation.max_tokens",
        "sampling.temperature": "evaluation.decoding.temperature",
        "sampling.stop": "evaluation.decoding.stop",
        "sampling.prompts_per_step": f"{NOTHING}the engine chooses how many answers it samples at a time",
        "task.name": "evaluation.task",
        "reward.functions": "evaluation.grader",
    },
}
_TABLES = {**{table: table for table in _IN_TABLE}, "benchmarks": "evaluation", "validation": "evaluation"}
_TABLES |= {"eval": "evaluation", "val_kwargs": "evaluation", "rm": "reward_model"}


def gruppo_name(location: Sequence[str], value: Any = None) -> str | None:
    """What to write in place of a field of another trainer, given its tables, its name and its value.

    The answer begins with `NOTHING` if gruppo has no such field. None if the name is unknown.
    """
    names = [part.lower().replace("-", "_") for part in location if not part.isdecimal()]
    ends = [".".join(names[-length:]) for length in range(len(names), 0, -1)]
    if reason := _reason(ends, _OF_OTHER_MODELS):
        return reason
    for end in ends:
        if answer := NAMES.get(end):
            if answer == "optimizer.warmup_steps" and isinstance(value, float):
                answer = "optimizer.warmup_ratio"
            return _in_table(answer, location)
    return _reason(ends, _REASONS)


def _reason(ends: Sequence[str], reasons: Iterable[tuple[str, str]]) -> str | None:
    """The first reason whose pattern fits one of the ends of a name."""
    return next((NOTHING + why for pattern, why in reasons for end in ends if fnmatchcase(end, pattern)), None)


def is_ignored(answer: str) -> bool:
    """Whether an answer of `gruppo_name` is that a name needs no field and changes nothing that a model learns."""
    return answer.startswith(NOTHING) and answer.removeprefix(NOTHING) in IGNORED


def fields_named(location: Sequence[str], tables: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """All fields of gruppo with the last of these names, as `table.field`, in the order of the tables.

    Only one if the tables that the name was found in show which one is meant, and none if more than four have the name,
    because then it says too little.
    """
    found = [f"{table}.{field}" for table, fields in tables for field in fields if field == location[-1]]
    meant = [answer for field in found if (answer := _in_table(field, location)) != field or _is_in(field, location)]
    return meant[:1] or (found if len(found) <= 4 else [])


def _is_in(field: str, location: Sequence[str]) -> bool:
    return field.rpartition(".")[0] in [_TABLES.get(part, part) for part in location[:-1]]


def _in_table(answer: str, location: Sequence[str]) -> str:
    """The answer for a name that was found in one of the tables of `_TABLES`, or in one table of a list."""
    table = next((_TABLES[part] for part in location[:-1] if part in _TABLES), "")
    answer = _IN_TABLE.get(table, {}).get(answer, answer)
    if table == "evaluation":
        if answer == "evaluation.task" and "task" in location[:-1]:
            answer = "evaluation.task.name"
        answer = f"evaluation.{answer}" if answer.startswith("task.") else answer
    if location[0] in {"mixture", "benchmarks"} and len(location) > 2:
        start = "task." if location[0] == "mixture" else "evaluation."
        answer = f"{location[0]}[{location[1]}].{answer.removeprefix(start)}" if answer.startswith(start) else answer
    return answer
