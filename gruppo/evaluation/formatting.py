"""Evaluation figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def told(name: str, found: Mapping[str, Any], note: str = "") -> list[str]:
    """Figures in words, a line each."""
    several = f", {found['samples']} answers each" if found["samples"] > 1 else ""
    lines = [
        f"{name}: accuracy {found['accuracy']:.1%} (95 % interval {_range(found)}, {found['questions']:,} "
        f"questions{several}){note}"
    ]
    for curve, points in found.get("curves", {}).items():
        title = {"pass": "pass@k", "maj": "maj@k", "best": "best-of-k"}[curve]
        shown = "  ".join(f"{k}: {point['value']:.1%} ({_range(point)})" for k, point in points.items())
        lines.append(f"  {title:<10} {shown}")
    if vote := found.get("weighted_vote"):
        lines.append(f"  weighted vote of all {found['samples']}: {vote['value']:.1%} ({_range(vote)})")
    return lines


def told_difference(name: str, first: str, second: str, found: Mapping[str, Any]) -> list[str]:
    """A comparison in words."""
    low, high = found["interval"]
    lines = [
        f"{name}: {second} less {first}: {found['difference']:+.1%} (95 % interval {low:+.1%} to {high:+.1%}, paired, "
        f"{found['questions']:,} questions)",
        f"  more right answers: {first} on {found['first_only']}, {second} on {found['second_only']} questions; the "
        f"smallest difference that so many questions can show is {found['smallest']:.1%}",
    ]
    if found.get("settings"):
        lines.append(f"  they were not asked alike: {'; '.join(found['settings'])}")
    if found["left_out"]:
        lines.append(f"  {found['left_out']} questions that only one of them was asked are left out")
    for curve, points in found.get("curves", {}).items():
        shown = "  ".join(
            f"{k}: {point['value']:+.1%} ({point['interval'][0]:+.1%} to {point['interval'][1]:+.1%})"
            for k, point in points.items()
        )
        lines.append(f"  {curve}@k{'':<5} {shown}")
    return lines


def _range(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{low:.1%} to {high:.1%}"
