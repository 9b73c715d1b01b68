"""Plots of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.errors import UsageError
from gruppo.runs.atomic import publish, writing
from gruppo.utils.stats import MOST_VOTES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make_figure() -> tuple[Figure, Axes]:
    """An empty figure. Raises UsageError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("figures: need matplotlib; pip install 'gruppo[plots]'") from None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's name. Equal figures give equal files."""
    from matplotlib import rc_context

    kind, temporary = path.suffix.removeprefix("."), path.with_name(f".writing-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with writing(path, temporary), rc_context({"svg.hashsalt": "gruppo"}):
        figure.savefig(temporary, format=kind, metadata=undated)
        publish(temporary, path)


def draw_curves(results: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> Figure:
    """Plot pass@k and maj@k of one or more models in one figure, like Figure 7 of DeepSeekMath.

    `results`: pairs of model name and figures. Raises UsageError if a model has no curves, or if matplotlib is not
    installed.
    """
    if missing := [name for name, figures in results if "maj" not in figures.get("curves", {})]:
        raise UsageError(f"--curves: {missing[0]}: needs 2 to {MOST_VOTES:,} answers per question")
    figure, axes = make_figure()
    from matplotlib.ticker import PercentFormatter

    for number, (name, figures) in enumerate(results):
        for style, curve in (("-", "pass"), ("--", "maj")):
            points = figures["curves"][curve]
            ks = [int(k) for k in points]
            color = f"C{number}"
            axes.plot(
                ks, [points[str(k)]["value"] for k in ks], style, color=color, marker="o", label=f"{name}: {curve}@k"
            )
            low, high = ([points[str(k)]["interval"][side] for k in ks] for side in (0, 1))
            axes.fill_between(ks, low, high, color=color, alpha=0.1, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="k", ylabel="accuracy, with 95% intervals over questions", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
