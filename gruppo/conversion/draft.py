"""A recipe in the making: fields with comments that say where they come from, and what has no equivalent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from gruppo.config.foreign_names import NOTHING, fields_named, gruppo_name, is_ignored
from gruppo.config.loading import recipe_mistakes, recipe_tables
from gruppo.config.methods import METHODS
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Section
from gruppo.conversion.given import Setting, Settings, is_off, written

FILL_IN = "FILL IN"

# Values that change nothing, of names that have no equivalent otherwise.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "optim": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam"),
    "optimizer": ("AdamW", "adamw"),
    "model_revision": ("main",),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "num_beams": (1,),
    "top_entropy_quantile": (1,),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "lora_task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True,),
    "bias": ("none",),
    "completion_only_loss": (True,),
    "top_p": (1,),
    "top_k": (-1,),
    "use_bias_correction_kl": (True,),
    "loss_type": ("nll",),
    "reward_manager": ("naive",),
    "type": ("fixed", "lora"),
    "chat_template": ("default",),
}

# Fields that need more than a value: which code to call, or which rows to read.
_BY_HAND = ("reward.", "reward_model.", "environment.", "evaluation.", "mixture", "method.tis_cap")

# An answer of the table of foreign names that gives a field its value.
_ASSIGNED = re.compile(r'(?P<field>(?!reward|evaluation)[\w.]+) = "(?P<value>[\w-]+)"')

# Tables of other trainers about another model than the policy -> gruppo's table for it.
_PARTS = {
    "critic.": "critic.",
    "reward.": "reward",
    "reward_model.": "reward",
    "actor_rollout_ref.ref.": "reference",
    "ref.": "reference",
}


@dataclass
class Entry:
    """A field of the recipe: its value, and the comment behind it."""

    value: Any
    comment: str
    given: bool


@dataclass
class Draft:
    """The recipe so far, from the settings of a trainer. Fields are named `table.field`.

    `missing`, `ignored` and `to_fill` are lines for the reader. `remarks` stand at the top of the recipe.
    """

    trainer: str
    settings: Settings
    fields: dict[str, Entry] = field(default_factory=dict)
    mixture: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    to_fill: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, source: Setting | str, given: bool = True) -> None:
        """Set a field. The comment names the source; a default of the trainer is left out if it is gruppo's too.

        A value that does not fit the field is listed as missing.
        """
        setting = source if isinstance(source, Setting) else None
        given = setting.given if setting else given
        try:
            checked = TypeAdapter(_annotation(name)).validate_python(value)
            tomli_w.dumps({"value": value})
        except (ValidationError, TypeError):  # of the wrong type, or with a null in it
            if given:
                self.lack(source, f"does not fit {name}; write that field")
            return
        value = value if isinstance(checked, Section) else checked
        origin = "'s default" if setting else ""
        comment = str(source) if given else f"{self.trainer}{origin}: {source}"
        if setting and given and written(setting.value) == written(value):
            comment = setting.name
        if given or value != self._default(name):
            self.fields[name] = Entry(value, comment, given)

    def ask(self, name: str, value: Any, what: str) -> None:
        """Set a field to a placeholder, or to a guess, that the user has to look at."""
        self.fields[name] = Entry(value, f"{FILL_IN}: {what}", True)
        self.to_fill.append(f"{name}: {what}")

    def lack(self, source: Setting | str, why: str) -> None:
        """Note that a value has no equivalent, and what to write instead."""
        self.missing.append(f"{source}: {why}")

    def skip(self, source: Setting | str, why: str) -> None:
        """Note that a value needs no field."""
        self.ignored.append(f"{source}: {why}")

    def remark(self, text: str) -> None:
        """Add a line to the top of the recipe."""
        self.remarks.append(text)

    def value(self, name: str) -> Any:
        """The value of a field so far: as set, else gruppo's default for the method."""
        return self.fields[name].value if name in self.fields else self._default(name)

    def _default(self, name: str) -> Any:
        table, _, last = name.rpartition(".")
        method = self.fields.get("method.name")
        row = METHODS[method.value].settings if method is not None and table == "method" else {}
        info = _field(name)
        return row.get(last, None if info is None else info.get_default(call_default_factory=True))

    def by_table(self) -> None:
        """Set every field whose name the table of foreign names gives, and sort the other names."""
        for setting in self.settings.rest():
            self._by_table(setting)

    def _by_table(self, setting: Setting) -> None:
        location = setting.name.split(".")
        answer = gruppo_name(location, setting.value)
        if answer is None:
            named = fields_named(location, recipe_tables())
            answer = named[0] if named else None
        if answer is None:
            self.lack(setting, "gruppo does not know this name; nothing was written for it")
        elif (value := _ASSIGNED.fullmatch(answer)) and not is_off(setting.value):
            self._take_over(value["field"], Setting(setting.name, value["value"], setting.given), str(setting))
        elif _field(answer) is not None and not answer.startswith(_BY_HAND):
            self._take_over(answer, setting, setting)
        elif setting.given:
            self._explain(answer, setting)

    def _take_over(self, name: str, setting: Setting, source: Setting | str) -> None:
        """Set a field to a value, unless it is set already, or the value is that of another model than the policy.

        `source`: for the comment.
        """
        table = next((table for start, table in _PARTS.items() if setting.name.startswith(start)), "")
        if not name.startswith(table):
            if setting.given and not is_off(setting.value):
                self.lack(setting, f"{name} is that of the policy")
        elif name in self.fields:
            self.skip(setting, f"{name} is set by {self.fields[name].comment}")
        elif setting.value is not None:
            self.put(name, setting.value, source, given=setting.given)

    def _explain(self, answer: str, setting: Setting) -> None:
        """Say what the table of foreign names says of a value for which there is no field."""
        reason = answer.removeprefix(NOTHING)
        if is_ignored(answer):
            self.skip(setting, reason)
        elif is_off(setting.value) or _is_neutral(setting):
            self.skip(setting, "this value changes nothing")
        elif answer == reason and answer.startswith(("--", "engine.memory")):
            self.skip(setting, f"see `gruppo train {answer}`" if answer.startswith("--") else f"see {answer}")
        else:
            self.lack(setting, reason if answer != reason else f"write {answer}")

    def lacks(self, unknown: Mapping[str, str]) -> None:
        """Note the names whose values are not in the file, unless gruppo has no use for them."""
        for name, why in unknown.items():
            answer = gruppo_name(name.split(".")) or ""
            if not is_ignored(answer) and not answer.startswith("--"):
                self.to_fill.append(f"{name}: {why}")

    def settle(self) -> None:
        """Leave out the fields that the recipe refuses, with the reason, until it can be loaded."""
        for _ in range(len(self.fields)):
            mistakes = recipe_mistakes(self.data())
            wrong = [(name, message) for name, message in mistakes if name in self.fields]
            if not wrong:
                self.to_fill += [message for _, message in mistakes]
                return
            name, message = wrong[0]
            entry = self.fields.pop(name)
            if entry.given:
                self.lack(entry.comment, message)

    def data(self) -> dict[str, Any]:
        """The recipe as nested tables."""
        data: dict[str, Any] = {}
        for name, entry in self.fields.items():
            *tables, last = name.split(".")
            inner = data
            for table in tables:
                inner = inner.setdefault(table, {})
            inner[last] = entry.value
        if self.mixture:
            data["mixture"] = [dict(table) for table in self.mixture]
        return data

    def spread(self) -> None:
        """With a mixture, move the fields of [task] into each of its tables."""
        for name in [name for name in self.fields if self.mixture and name.startswith("task.")]:
            value = self.fields.pop(name).value
            for table in self.mixture:
                table.setdefault(name.removeprefix("task."), value)


def _is_neutral(setting: Setting) -> bool:
    known = _NEUTRAL.get(setting.name.rpartition(".")[2], ())
    return any(setting.value == value or str(setting.value) == str(value) for value in known) or (
        setting.value in ("1.0", 1.0) and 1 in known
    )


def _field(name: str) -> FieldInfo | None:
    """The field of the recipe called `table.field`; None if there is none, or if it is a table itself."""
    section: type[Section] = Recipe
    *tables, last = name.split(".")
    if not tables:
        return None
    for table in tables:
        info = section.model_fields.get(table)
        inner = [] if info is None else [info.annotation, *get_args(info.annotation)]
        kinds = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, Section)]
        if not kinds:
            return None
        section = kinds[0]
    return section.model_fields.get(last)


def _annotation(name: str) -> Any:
    """The type of a field with its bounds, for values that may be written as text."""
    info = _field(name)
    assert info is not None, name
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
