"""The figures of a study. Equal data give equal files: no dates, no random ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gruppo.evaluation.plots import make_figure, save_figure
from gruppo.study.answers import Answered, curve_of, value_of
from gruppo.study.arms import Study
from gruppo.study.evaluations import untrained_models
from gruppo.study.file import FigureTable
from gruppo.study.run_data import RunData
from gruppo.study.states import RunState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 200  # of a curve over tokens


def write_figures(study: Study, states: Mapping[str, RunState], answered: Answered, folder: Path) -> list[Path]:
    """Write every figure that has data as an SVG and a PNG file. Returns the SVG files."""
    written = []
    for table in study.file.figures:
        figure, axes = make_figure()
        if _DRAW[table.kind](study, states, answered, table, axes):
            axes.set_title(table.title or table.metric or table.evaluation)
            axes.grid(alpha=0.3)
            for suffix in ("svg", "png"):
                save_figure(figure, folder / f"{table.name}.{suffix}")
            written.append(folder / f"{table.name}.svg")
    return written


def _draw_curve(
    study: Study, states: Mapping[str, RunState], answered: Answered, table: FigureTable, axes: Axes
) -> bool:
    for arm in study.file.shown_arms(table):
        runs = [run for run in study.runs_of(arm.name) if states[run.name].complete]
        read = [data for run in runs if (data := states[run.name].data) is not None]
        curves = [curve for data in read if (curve := _points(data, table)) is not None]
        if not curves:
            continue
        start, end = max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves)
        places = np.unique(np.concatenate([curve[0] for curve in curves]))
        xs = np.linspace(start, end, POINTS) if table.by == "tokens" else places[(places >= start) & (places <= end)]
        values = np.array([np.interp(xs, curve[0], curve[1]) for curve in curves])
        color = f"C{study.file.arms.index(arm)}"
        label = f"{arm.title} ({len(curves)} seed{'s' if len(curves) > 1 else ''})"
        alone = "o" if len(xs) == 1 or start == end else None  # a line of one point is invisible
        axes.plot(xs, values.mean(axis=0), color=color, label=label, marker=alone)
        if len(curves) > 1:
            axes.fill_between(xs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
    if not axes.lines:
        return False
    axes.set_xlabel("sampled tokens" if table.by == "tokens" else "step")
    axes.set_ylabel(f"{table.metric} (band: range over seeds)")
    axes.legend()
    return True


def _points(data: RunData, table: FigureTable) -> np.ndarray | None:
    """A metric of a run: two rows, where it was measured and its values, smoothed. None if it has none."""
    lines = [line for line in data.metrics if line.get(table.metric) is not None]
    steps = np.array([line["step"] for line in lines], dtype=float)
    values = np.array([line[table.metric] for line in lines], dtype=float)
    if table.by == "tokens":
        tokens = data.tokens.items()
        steps = np.array([sum(count for step, count in tokens if step <= at) for at in steps], dtype=float)
    width = min(table.smooth, len(values))
    if width > 1:
        values = np.convolve(values, np.full(width, 1 / width), mode="valid")
        steps = steps[width - 1 :]
    return np.array([steps, values]) if len(values) else None


def _draw_bars(
    study: Study, states: Mapping[str, RunState], answered: Answered, table: FigureTable, axes: Axes
) -> bool:
    evaluation, kind, k = study.file.parsed(table.metric)
    found = [
        (title, color, value)
        for name, initial, title, color in models_of(study, table)
        if (value := value_of(answered.table(evaluation, name, kind, k, initial))) is not None
    ]
    for place, (_, color, value) in enumerate(found):
        low, high = value["interval"]
        errors = [[max(0.0, value["mean"] - low)], [max(0.0, high - value["mean"])]]
        axes.bar(place, value["mean"], color=color, alpha=0.7, width=0.6)
        axes.errorbar(place, value["mean"], errors, color="black", capsize=4, linewidth=1)
        seeds = list(value["seeds"].values())
        axes.plot(np.linspace(place - 0.15, place + 0.15, len(seeds)), seeds, "o", color="black", markersize=3)
    axes.set_xticks(range(len(found)), [title for title, _, _ in found])
    axes.set_ylabel(f"{table.metric}, 95% interval")
    axes.set_ylim(bottom=0)
    _percent(axes)
    return bool(found)


def _draw_samples(
    study: Study, states: Mapping[str, RunState], answered: Answered, table: FigureTable, axes: Axes
) -> bool:
    for name, initial, title, color in models_of(study, table):
        for style, kind in (("-", "pass"), ("--", "maj")):
            seeds = list(answered.answers_of(table.evaluation, name, initial).values())
            if not seeds:
                continue
            curve = curve_of(seeds, kind)
            means = [float(np.mean(values)) for values in curve.values()]
            axes.plot(list(curve), means, style, color=color, marker="o", markersize=3, label=f"{title}: {kind}@k")
            if len(seeds) > 1:
                lows, highs = (list(map(extreme, curve.values())) for extreme in (min, max))
                axes.fill_between(list(curve), lows, highs, color=color, alpha=0.12, linewidth=0)
    if not axes.lines:
        return False
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="k", ylabel=f"{table.evaluation} (band: range over seeds)")
    _percent(axes)
    axes.legend(fontsize="small")
    return True


_DRAW = {"curve": _draw_curve, "bars": _draw_bars, "samples": _draw_samples}


def models_of(study: Study, table: FigureTable) -> list[tuple[str, bool, str, str]]:
    """The models in a figure: arm, whether what it begins with is meant, title and color. An arm has one color in all
    figures. What the arms begin with comes first, unless it is one of the arms."""
    colors = {arm.name: f"C{place}" for place, arm in enumerate(study.file.arms)}
    shown = study.file.shown_arms(table)
    evaluation = study.file.evaluation(table.evaluation or study.file.parsed(table.metric)[0])
    untrained = untrained_models(study, evaluation, [arm.name for arm in shown])
    begun = {title: (name, True, title, "0.6") for name, title in untrained}
    for arm in shown:
        if arm.start is not None and arm.start not in [other.name for other in shown]:
            begun.setdefault(arm.start, (arm.name, True, study.file.arm(arm.start).title, colors[arm.start]))
    return list(begun.values()) + [(arm.name, False, arm.title, colors[arm.name]) for arm in shown]


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
