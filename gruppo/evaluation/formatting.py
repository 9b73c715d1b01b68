"""Evaluation results as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_results(name: str, figures: Mapping[str, Any], note: str = "") -> list[str]:
    """The results of one evaluation set, as lines of text."""
    samples = f", {figures['samples']} answers each" if figures["samples"] > 1 else ""
    lines = [
        f"{name}: accuracy {figures['accuracy']:.1%} (95% interval {_range(figures)})",
        f"  {figures['questions']:,} questions{samples}{note}",
    ]
    for curve, points in figures.get("curves", {}).items():
        title = {"pass": "pass@k", "maj": "maj@k", "best": "best-of-k"}[curve]
        lines += _columns(title, [f"{k}: {point['value']:.1%} ({_range(point)})" for k, point in points.items()])
    if vote := figures.get("weighted_vote"):
        lines.append(f"  weighted vote of all {figures['samples']}: {vote['value']:.1%} ({_range(vote)})")
    return lines


def format_difference(name: str, first: str, second: str, comparison: Mapping[str, Any]) -> list[str]:
    """The difference between two models on one evaluation set, as lines of text."""
    low, high = comparison["interval"]
    lines = [
        f"{name}: difference ({second} - {first}) {comparison['difference']:+.1%}",
        f"  95% interval {low:+.1%} to {high:+.1%}, paired, {comparison['questions']:,} questions",
        f"  smallest difference that this many questions can show: {comparison['smallest']:.1%}",
        f"  questions with more correct answers from {first}: {comparison['first_only']}",
        f"  questions with more correct answers from {second}: {comparison['second_only']}",
    ]
    if comparison.get("settings"):
        lines.append(f"  settings differ: {'; '.join(comparison['settings'])}")
    if comparison["left_out"]:
        lines.append(f"  left out: {comparison['left_out']} questions that only one of them answered")
    for curve, points in comparison.get("curves", {}).items():
        lines += _columns(f"{curve}@k", [
            f"{k}: {point['value']:+.1%} ({point['interval'][0]:+.1%} to {point['interval'][1]:+.1%})"
            for k, point in points.items()
        ])  # fmt: skip
    return lines


def _columns(title: str, cells: list[str]) -> list[str]:
    """`cells` in two columns, so that they fit 80 characters, behind a title."""
    rows = ["".join(f"{cell:<34}" for cell in cells[start : start + 2]) for start in range(0, len(cells), 2)]
    return [f"  {title if not number else '':<10} {row}".rstrip() for number, row in enumerate(rows)]


def _range(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{low:.1%} to {high:.1%}"
