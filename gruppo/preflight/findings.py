"""Findings of `gruppo check`: what was found, why it matters, and what to change."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gruppo.errors import is_visible

Severity = Literal["ok", "note", "warning", "problem"]

WIDTH = 80  # columns of a terminal
_SEVERITY = 9  # columns for the severity


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `severity`: "ok"; "note" (worth knowing); "warning" (may spoil the run); "problem" (will spoil the run). `subject`:
    what was checked, in a word or two. `what`: what was found. `why`: why it matters. `change`: what to change.
    `figures`: the same as plain values, for JSON.
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
        """The finding as lines of at most 80 columns."""
        lines = _wrapped(f"{self.subject}: {self.what}", f"{self.severity:<{_SEVERITY}}", _SEVERITY)
        for name, text in (("why", self.why), ("do", self.change)):
            head = f"{'':<{_SEVERITY}}{name}: "
            lines += _wrapped(text, head, len(head)) if text else []
        return lines


def _wrapped(text: str, head: str, indent: int) -> list[str]:
    """`text` wrapped after `head`, without the invisible characters that a template or a reward may contain."""
    shown = "".join(character if is_visible(character) else " " for character in text)
    return textwrap.wrap(shown, WIDTH, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False)


def format_findings(findings: Iterable[Finding]) -> str:
    """All findings as text, the most severe last, followed by a line with their counts."""
    listed = list(findings)
    order = ["ok", "note", "warning", "problem"]
    ordered = sorted(listed, key=lambda finding: order.index(finding.severity))
    lines = [line for finding in ordered for line in finding.lines()]
    counts = {severity: sum(finding.severity == severity for finding in listed) for severity in reversed(order)}
    shown = [
        f"{count} {severity}{'s' if count != 1 and severity != 'ok' else ''}" for severity, count in counts.items()
    ]
    return "\n".join([*lines, "", "Found: " + ", ".join(shown)])
