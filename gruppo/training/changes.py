"""What a resumed run does with changes: they are checked, stored in environment.json, and recorded as events.

environment.json has the list of all changes since the start, with the step after which each one was made. An event that
a killed run did not keep is recorded again from this list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.config.resume import LENGTH, MEMORY
from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction
from gruppo.rewards.identity import old_digest
from gruppo.runs.changes import Change
from gruppo.runs.folder import PENDING, RunFolder
from gruppo.runs.reading import read_lines
from gruppo.training.identity import require_same
from gruppo.training.memory_estimate import ChosenSizes

KIND = "changed"  # of the events
DIFFER = "from here on, results differ from those of the original run"


@dataclass
class Changes:
    """What has changed since a run was started or last resumed.

    `found`: the changes. `environment`: new content of environment.json, by key. `lasting`: descriptions of differences
    from the start that every resume finds again.
    """

    found: list[Change] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    lasting: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """All of them in words."""
        changes = [change.effect if isinstance(change, CodeChange) else change.message for change in self.found]
        return [*changes, *self.lasting]

    def has(self, rule: str) -> bool:
        """Whether a field with this rule has changed (see `gruppo.config.resume`)."""
        return any(change.rule == rule for change in self.found)

    @property
    def resizes_folder(self) -> bool:
        """Whether the run may need more disk space than before."""
        return self.has(LENGTH) or any(
            change.of_evaluation or change.field == "run.checkpoint_every" for change in self.found
        )

    def check_data(self, before: Mapping[str, Any], whole: str, prompts: str) -> None:
        """Raise UsageError unless the run continues with the prompts it started with, and with its questions unless
        fields of the evaluation have changed. `whole`: hash of prompts and questions; `before`: environment.json."""
        if before["data_sha256"] == whole:
            return
        if not any(change.of_evaluation for change in self.found):
            require_same(before["data_sha256"], whole, "questions")
        if "prompts_sha256" not in before:
            raise UsageError(
                "--resume: the run was started by a version of gruppo that recorded no hash of its prompts alone, so "
                "its evaluation cannot change; restore the fields of [evaluation] and [[benchmarks]]"
            )
        require_same(before["prompts_sha256"], prompts, "training prompts")
        self.environment["data_sha256"] = whole

    def compare_code(
        self, before: Sequence[str], now: Sequence[str], names: Sequence[str], rewards: Sequence[str | RewardFunction]
    ) -> None:
        """Find rewards and environments whose code has changed. `before`, `now`: hashes of their code; `names`: of
        both; `rewards`: the reward functions, which come first."""
        by_old_rule = [None if isinstance(reward, str) else old_digest(reward) for reward in rewards]
        known = list(before) + [""] * (len(now) - len(before))
        for place, (was, is_) in enumerate(zip(known, now, strict=False)):
            if was not in (is_, *by_old_rule[place : place + 1]):
                name = names[place]
                what = "reward.functions" if place < len(rewards) else "environment.name"
                self.found.append(CodeChange(what, was or None, is_, f"the code of {name} has changed"))
        if list(before) != list(now):
            self.environment["rewards_sha256"] = list(now)

    def choose_sizes(self, before: Mapping[str, Any], sizes: ChosenSizes) -> dict[str, Any]:
        """Store the sizes that a changed run.memory or number of ranks gives. Returns them with the other settings of
        the machine."""
        old = before["chosen"]
        chosen = {
            **old,
            "slots": sizes.slots,
            "micro_batch_tokens": sizes.micro_batch_tokens,
            "recompute": sizes.recompute,
            "memory_budget_bytes": sizes.budget_bytes,
        }
        self.environment |= {"chosen": chosen, "memory_forecast": sizes.memory.as_dict()}
        names = ("micro_batch_tokens", "slots", "recompute")
        listed = ", ".join(f"{name} {old.get(name)} -> {chosen[name]}" for name in names)
        effect = f": sizes were chosen anew ({listed}); from here on, rounding may differ, so results may not equal "
        effect += "those of an unchanged run bit for bit"
        self.found = [replace(change, effect=effect) if change.rule == MEMORY else change for change in self.found]
        return chosen

    def record(self, run: RunFolder, recipe: Recipe, step: int) -> list[Mapping[str, Any]]:
        """Store the changes, and the recipe with them. Returns those without an event in events.jsonl.

        `step`: the number of steps that are done. Nothing is stored earlier, so a resume that fails before changes
        nothing. environment.json is written first and holds the recipe until recipe.toml has it, so a kill in between
        loses neither.
        """
        before = run.read_json("environment.json")
        if before is None:
            return []
        known = [{**entry, "step": min(int(entry["step"]), step)} for entry in before.get("changes", [])]
        entries = known + [{"step": step, **change.as_dict()} for change in self.found]
        environment = {**before, **self.environment}
        pending = environment.pop(PENDING, None) is not None
        if entries or "changes" in before:
            environment["changes"] = entries
        if self.has(MEMORY):  # sizes that were reduced are chosen anew
            environment["halvings"] = [one for one in before.get("halvings", []) if one["step"] <= step]
        if pending or any(not isinstance(change, CodeChange) for change in self.found):
            run.write_json("environment.json", {**environment, PENDING: recipe.to_toml()})
            if self.has(LENGTH):
                (run.path / "summary.json").unlink(missing_ok=True)  # it describes a run of another length
            run.start(recipe)
        if environment != before or pending:
            run.write_json("environment.json", environment)
        recorded = Counter(_key(event) for event in read_lines(run.path / "events.jsonl") if event["kind"] == KIND)
        missing = Counter(map(_key, entries)) - recorded
        return [entry for entry in entries if missing[_key(entry)]]


@dataclass(frozen=True)
class CodeChange(Change):
    """Code that is not what it was. `old`, `new`: its hashes; `effect`: the change in words."""

    @property
    def message(self) -> str:
        """The change in words."""
        return f"{self.effect}; {DIFFER}"


def comparable_from(environment: Mapping[str, Any] | None, evaluated: Mapping[str, Any]) -> int:
    """The first step whose evaluation can be compared with later ones. `evaluated`: evaluations by step."""
    changes = (environment or {}).get("changes", [])
    steps = [
        int(entry["step"]) + (str(entry["step"]) in evaluated)
        for entry in changes
        if Change(entry["field"], None, None).ends_comparison
    ]
    return max(steps, default=0)


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry.get("step"), entry.get("field"), entry.get("old"), entry.get("new")], sort_keys=True)
