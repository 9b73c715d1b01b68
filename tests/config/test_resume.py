"""Every field of a recipe has one rule for what a resume may do with it."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from gruppo.config.recipe import Recipe
from gruppo.config.resume import FIXED, FREE, LENGTH, MEMORY, REASONS, RULES, rule_of
from gruppo.config.sections import Section


def fields() -> list[str]:
    found = []
    for table, field in Recipe.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
        found += [f"{table}.{name}" for name in section.model_fields]
    return found


def test_every_field_is_in_exactly_one_list() -> None:
    listed = [f"{table}.{name}" for tables in RULES.values() for table, names in tables.items() for name in names]
    assert [name for name, count in Counter(listed).items() if count > 1] == []
    assert sorted(listed) == sorted(fields())
    assert set(RULES) == {FREE, LENGTH, MEMORY, FIXED}
    assert set(RULES[FIXED]) <= set(REASONS)


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("reward.timeout", FREE), ("evaluation", FREE), ("evaluation.task.name", FREE), ("audit", FREE),
        ("benchmarks", FREE), ("benchmarks[2].decoding.stop[0]", FREE), ("run.steps", LENGTH), ("run.memory", MEMORY),
        ("task.name", FIXED), ("mixture[0].weight", FIXED), ("model.lora.rank", FIXED), ("model.lora", FIXED),
        ("environment", FIXED), ("reward_model", FIXED), ("reward.options.f.x", FIXED),
        ("optimizer.warmup_ratio", LENGTH), ("cluster.trainers", MEMORY), ("cluster.engines", FREE), ("cluster", FIXED),
    ],
)  # fmt: skip
def test_the_rule_of_a_field(field: str, rule: str) -> None:
    assert rule_of(field) == rule
