"""A plan as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from gruppo.planning.placement import Placement, engine_memory
from gruppo.planning.plan import Plan
from gruppo.planning.published import ratios
from gruppo.planning.trainer import rank_memory

_WIDTH = 100
_KINDS = {
    "colocated": "colocated: all devices take turns",
    "synchronous": "apart, waiting for each other (lag = 0)",
    "ahead": "apart, sampling one step ahead (lag = 1)",
}


def describe_plan(plan: Plan) -> str:
    """The plan: the work of a step, placements, memory, settings, problems, and every assumption with its source."""
    parts = [
        _work(plan), _placements(plan), _memory(plan), _settings(plan), _listed("Does not fit:", plan.problems),
        _listed("Not in these figures:", plan.notes), _assumptions(plan),
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _work(plan: Plan) -> list[str]:
    shape, work = plan.shape, plan.work
    weights = f"{shape.parameters / 1e9:.3g} billion weights"
    if shape.experts:
        weights += f", {shape.active / 1e9:.3g} billion per token"
    passes = [f"{work.passes.updates:g} update{'s' * (work.passes.updates != 1)}"]
    if work.passes.scores:
        passes.append(f"{work.passes.scores:g} scoring pass{'es' * (work.passes.scores != 1)}")
    lines = [f"{shape.name} ({weights}) on {plan.cluster}"]
    what = f"{work.completions:,} completions" if work.sampled else f"{work.completions:,} rows, nothing sampled"
    text = (
        f"A step: {what} of {work.lengths.mean:,.0f} tokens on average (at most {work.longest:,}), "
        f"{work.training_tokens / 1e6:.3g} million tokens to train on, {' and '.join(passes)}"
        f"{', with recomputation' if work.passes.recompute else ''}."
    )
    return [*lines, *textwrap.wrap(text, _WIDTH)]


def _placements(plan: Plan) -> list[str]:
    if not plan.placements:
        return []
    head = f"{'Seconds':<42}{'step':>8}{'sampling':>10}{'(tail)':>9}{'scoring':>9}{'updates':>9}{'transfer':>10}"
    lines = [head]
    for placed in plan.placements:
        tail = 0.0 if placed.sampling is None else placed.sampling.tail
        mark = "*" if placed is plan.chosen else " "
        lines.append(
            f"{mark}{_KINDS[placed.kind]:<41}{_seconds(placed.step):>8}{_seconds(placed.sampling_seconds):>10}"
            f"{_seconds(tail):>9}{_seconds(placed.training.scores):>9}{_seconds(placed.training.updates):>9}"
            f"{_seconds(placed.transfer):>10}"
        )
        lines.append(f"    {_devices(placed)}")
    chosen = plan.chosen
    if chosen is None:
        return lines
    trainers, engines = chosen.idle
    lines += ["", f"Bottleneck: {chosen.bottleneck}."]
    if chosen.kind != "colocated":
        lines.append(f"Idle: trainers {trainers:.0%} of a step, engines {engines:.0%} and their part of the tail.")
    total = plan.total_seconds
    assert total is not None
    lines.append(f"In all: {_duration(total)} for {plan.recipe.run.steps:,} steps.")
    if plan.cluster.devices > 1 and plan.work.sampled:
        lines += textwrap.wrap(
            "gruppo trains and samples on devices apart with the table [cluster], in turn or with a lag "
            "(docs/scale.md, docs/ahead.md).",
            _WIDTH,
        )
    return lines


def _devices(placed: Placement) -> str:
    trainers = f"{placed.trainers} trainer{'s' * (placed.trainers > 1)}"
    if placed.sampling is None:
        return trainers
    each = f"{placed.engine_devices} device{'s' * (placed.engine_devices > 1)}"
    return (
        f"{trainers}, {placed.engines} engine{'s' * (placed.engines > 1)} "
        f"of {each}, up to {placed.sampling.running} concurrent completions in each"
    )


def _memory(plan: Plan) -> list[str]:
    room, total = rank_memory(plan.cluster), sum(plan.trainer_bytes.values())
    lines = ["Memory of a device, in GB"]
    shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.trainer_bytes.items())
    lines.append(f"  trainer  {total / 1e9:6.1f} of {room / 1e9:.1f}: {shown}")
    if plan.engine_bytes:
        room = engine_memory(plan.cluster, plan.assumptions)
        shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.engine_bytes.items())
        lines.append(f"  engine   {sum(plan.engine_bytes.values()) / 1e9:6.1f} of {room / 1e9:.1f}: {shown}")
        if plan.cluster.devices > 1:
            lines.append(f"Transfer: {plan.shape.weight_bytes / 1e9:.1f} GB of weights after each step.")
    return lines


def _settings(plan: Plan) -> list[str]:
    if not plan.settings:
        return []
    return ["Split of the devices:", *(f"  {name} = {value}" for name, value in plan.settings.items())]


def _listed(title: str, texts: Iterable[str]) -> list[str]:
    lines = [
        line for text in texts for line in textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]
    return [title, *lines] if lines else []


def _assumptions(plan: Plan) -> list[str]:
    device = plan.cluster.device
    lines = ["Assumptions (each has an option of the same name):"]
    for name, number in plan.assumed.items():
        head = f"  --{name.replace('_', '-'):<20}{number['value']:>10,.6g} {number['unit']:<12}"
        text = f"{number['meaning']} ({number['source']})"
        lines += textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * 46)
    published = (
        f"Published: {device.name} {device.flops / 1e12:,.0f} TFLOP/s in bfloat16, {device.memory / 1e9:.0f} GB, "
        f"{device.bandwidth / 1e12:.3g} TB/s, {device.link / 1e9:.0f} GB/s to a device of the same machine "
        f"({device.source})."
    )
    low, middle, high = ratios(plan.checked)
    checked = (
        f"Checked: these assumptions predict {len(plan.checked)} published runs at {low:.2f} to {high:.2f} times their "
        f"time, with a median of {middle:.2f} (docs/plan.md)."
    )
    return [*lines, *textwrap.wrap(published, _WIDTH), *textwrap.wrap(checked, _WIDTH)]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}" if seconds else "0"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 6000 else f"{minutes / 1440:.1f} days"
