"""What `gruppo check` finds: what there is, why it matters, and what to change."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["ok", "note", "warning", "problem"]

WIDTH = 80  # columns of a terminal
_SEVERITY = 9  # of them


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `severity`: "ok"; "note", which a person should know; "warning", which may spoil the run; "problem", which will.
    `subject`: what was looked at, in a word or two; `what`: what was found; `why` it matters; what to `change`.
    `figures`: the same in plain values, for JSON.
    """

    severity: Severity
    subject: str
    what: str
    why: str = ""
    change: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The finding in lines of 80 columns."""
        lines = _wrapped(f"{self.subject}: {self.what}", f"{self.severity:<{_SEVERITY}}", _SEVERITY)
        for name, text in (("why", self.why), ("do", self.change)):
            head = f"{'':<{_SEVERITY}}{name}: "
            lines += _wrapped(text, head, len(head)) if text else []
        return lines


def _wrapped(text: str, head: str, indent: int) -> list[str]:
    """`text` without control characters, which a template or a reward may bring, behind `head`."""
    shown = "".join(each if each.isprintable() else " " for each in text)
    return textwrap.wrap(shown, WIDTH, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False)


def described(findings: Iterable[Finding]) -> str:
    """All findings, the gravest last, where a terminal ends, and a line that counts them."""
    held = list(findings)
    order = ["ok", "note", "warning", "problem"]
    lines = [line for each in sorted(held, key=lambda each: order.index(each.severity)) for line in each.lines()]
    counts = [f"{sum(each.severity == kind for each in held)} {kind}" for kind in reversed(order)]
    return "\n".join([*lines, "", "Found: " + ", ".join(counts)])
