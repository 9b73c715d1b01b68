"""Write the tables of devices, assumptions and published runs into docs/plan.md.

    make plan-tables        (or: python scripts/plan_tables.py)

The figures come from gruppo/planning; the comparison is computed anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import known_devices
from gruppo.planning.published import Comparison, compare_published

PAGE = Path("docs/plan.md")


def devices() -> str:
    """A row for each device."""
    lines = [
        "| device | bfloat16, TFLOP/s | memory, GB | memory, TB/s | link, GB/s | data sheet |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for device in known_devices().values():
        lines.append(
            f"| {device.name} | {device.flops / 1e12:,.0f} | {device.memory / 1e9:.0f} | {device.bandwidth / 1e12:.3g} "
            f"| {device.link / 1e9:.0f} | {device.source}, as given in {device.read_in} |"
        )
    return "\n".join(lines)


def assumptions() -> str:
    """A row for each assumption."""
    lines = ["| option | value | meaning | source |", "| --- | --- | --- | --- |"]
    for name, number in Assumptions().named().items():
        value = "" if number["value"] is None else f"{number['value']:g} "
        lines.append(
            f"| `--{name.replace('_', '-')}` | {value}{number['unit']} | {number['meaning']} | {number['source']} |"
        )
    return "\n".join(lines)


def published() -> str:
    """A row for each published run, and its sources and notes."""
    lines = ["| run | mean length | step | phases |", "| --- | --- | --- | --- |"]
    comparisons = compare_published()
    for run in comparisons:
        mean = f"{run.mean_tokens:,.0f}{' (inferred)' if run.inferred else ''}"
        step = _both(run, "step") + (", without updates" if run.inferred else "")
        phases = "; ".join(f"{name} {_both(run, name)}" for name in run.published if name != "step")
        lines.append(f"| {run.name} | {mean} | {step} | {phases} |")
    notes = [f"- {run.name}: {run.note}" for run in comparisons if run.note]
    sources = [f"- {source}" for source in dict.fromkeys(run.source for run in comparisons)]
    return "\n".join([*lines, "", *notes, "", "Sources:", "", *sources])


def _both(run: Comparison, phase: str) -> str:
    return f"{run.predicted[phase]:,.0f} s for {run.published[phase]:,.0f} s ({run.error(phase):+.0%})"


TABLES: dict[str, Callable[[], str]] = {"devices": devices, "assumptions": assumptions, "published": published}


def page() -> str:
    """The page with its tables as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}: written by scripts/plan_tables.py -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        assert count == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
