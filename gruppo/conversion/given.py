"""The settings of another trainer: what the user wrote, and its defaults for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Trainer = Literal["TRL", "verl", "OpenRLHF"]


@dataclass(frozen=True)
class Source:
    """What was read: the trainer, its method ("grpo", "ppo", …), the values by name, and notes on the reading.

    `processes` is None if what was read does not say how many processes train. `unknown` are names whose values depend
    on something outside the file, with the reason.
    """

    trainer: Trainer
    method: str
    origin: str
    values: Mapping[str, Any]
    processes: int | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One value, and whether the user gave it; otherwise it is the trainer's default."""

    name: str
    value: Any
    given: bool

    def __str__(self) -> str:
        return f"{self.name} = {written(self.value)}"


class Settings:
    """Values by name, each of which is used once; what is left at the end was not understood."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._defaults = dict(defaults)
        self.used: list[str] = []

    def take(self, *names: str) -> Setting:
        """The value of the first of these names that was given, else the default of the first that has one.

        All of the names count as used. The value is None if there is none.
        """
        found = [Setting(name, self._values[name], True) for name in names if name in self._values]
        found += [Setting(name, self._defaults[name], False) for name in names if name in self._defaults]
        self.used += [name for name in names if name in self._values]
        for name in names:
            self._values.pop(name, None)
            self._defaults.pop(name, None)
        return found[0] if found else Setting(names[0], None, False)

    def default(self, name: str, value: Any) -> None:
        """Give a name a default."""
        self._defaults[name] = value

    def number(self, *names: str) -> float | None:
        """As `take`, as a number; None if the value is not one."""
        return as_number(self.take(*names).value)

    def flag(self, *names: str) -> bool:
        """As `take`, as a truth value: false for what `is_off`."""
        return not is_off(self.take(*names).value)

    def is_given(self, *names: str) -> bool:
        """Whether the user gave any of these names, and it was not used yet."""
        return any(name in self._values for name in names)

    def rest(self) -> Iterator[Setting]:
        """What was not used: the values that were given, then the defaults of other names."""
        yield from (Setting(name, value, True) for name, value in self._values.items())
        yield from (Setting(name, value, False) for name, value in self._defaults.items() if name not in self._values)


def as_number(value: Any) -> float | None:
    """A value as a number: also from a text, as YAML leaves 1e-6. None if it is not a finite one."""
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) < float("inf") else None


def is_off(value: Any) -> bool:
    """Whether a value turns an option off: nothing, false, zero, or a word for one of these."""
    text = str(value).strip().lower() if isinstance(value, str) else value
    return text in (None, False, 0, "", "false", "none", "null", "no", "off", "0", "0.0") or text in ([], {}, ())


def as_list(value: Any) -> list[Any]:
    """A value as a list: a list as it is, a text split at its commas, nothing as no items."""
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def written(value: Any) -> str:
    """A value as in YAML, truncated to 80 characters."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
