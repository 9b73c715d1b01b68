"""The curves of a run: which metrics belong together, and the numbers that the page draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gruppo.ui.live import LiveRun, thin

POINTS = 800  # of a curve
AXES = {"step": "step", "tokens": "sampled tokens", "time": "hours of training and evaluation"}
STEP = "completion/length"  # a metric of every step, and only of steps
_MOST_COST = 1e15  # tokens or hours of a step; beyond it a file is damaged
_MARKS = 400  # events on the curves, the last ones
_NAME = r"[^/]+(?:/[^/]+)*?"  # of a reward, a task or a set


@dataclass(frozen=True)
class Chart:
    """Metrics that are drawn together. `names`: patterns of metrics, and the label of each ("{}": what the pattern's
    group matched). `band`: patterns of the lower and upper ends of an interval around the first metric. `kind`:
    "lines" or "stack". `unit`: "share" (drawn as percent), "bytes", "seconds" or "" (a plain number)."""

    id: str
    title: str
    help: str
    names: Mapping[str, str]
    band: tuple[str, str] | None = None
    kind: str = "lines"
    unit: str = ""
    open: bool = True


CHARTS = (
    Chart("reward", "Reward", "Mean reward of the completions of a step, and of each reward function (unweighted).",
          {"reward/mean": "reward", rf"reward/(?!log/)({_NAME})/mean": "{}"}),
    Chart("accuracy", "Held-out accuracy", "Accuracy on held-out questions with its 95% interval.",
          {"eval/accuracy": "held out", rf"eval/({_NAME})/accuracy": "{}"},
          ("eval/accuracy_low", "eval/accuracy_high"), unit="share"),
    Chart("kl", "KL to the reference", "Per token, in nats.", {"policy/kl": "KL"}),
    Chart("entropy", "Entropy", "Of the policy per sampled token, in nats. Near 0 the policy has collapsed.",
          {"policy/entropy": "entropy"}),
    Chart("length", "Completion length", "Sampled tokens per completion: mean, shortest and longest of a step.",
          {"completion/length": "mean"}, ("completion/length_min", "completion/length_max")),
    Chart("truncated", "Truncated and excluded", "Shares of completions: truncated at max_tokens, excluded because a "
          "reward failed, and equal to another one of their group.",
          {"completion/truncated": "truncated", "reward/excluded": "excluded",
           "groups/duplicate_completions": "duplicates"}, unit="share"),
    Chart("nonzero", "Groups with nonzero advantage", "Only these groups teach something: their rewards differ.",
          {"groups/nonzero_advantage": "nonzero advantage"}, unit="share"),
    Chart("gradient", "Gradient norm", "Before clipping.",
          {"optimizer/gradient_norm": "policy", "value/gradient_norm": "value model",
           "reward_model/gradient_norm": "reward model"}),
    Chart("clip", "Clipped tokens", "Share of tokens whose ratio is beyond the clip in the direction of their "
          "advantage.",
          {"policy/clipped_high": "above", "policy/clipped_low": "below",
           "engine/importance_capped": "importance capped"}, unit="share"),
    Chart("engine", "Engine against trainer", "Difference of the log-probabilities of the same tokens, in nats.",
          {"engine/logprob_difference_mean": "mean", "engine/logprob_difference_max": "largest"}),
    Chart("speed", "Tokens per second", "Sampled tokens per second of sampling.",
          {"time/tokens_per_second": "tokens/s"}),
    Chart("phases", "Seconds by phase", "Of a step.",
          {"time/generate": "sampling", "time/reward": "rewards", "time/score": "scoring", "time/update": "update",
           "time/load_weights": "loading weights", "time/write": "writing"}, kind="stack", unit="seconds"),
    Chart("memory", "Memory", "Peak so far.", {"memory/peak_bytes": "peak"}, unit="bytes"),
    Chart("loss", "Loss", "See docs/methods.md: with GRPO it stays near 0 while the policy learns.",
          {"loss/total": "loss", "dpo/loss": "DPO", "value/loss": "value model", "reward_model/loss": "reward model"},
          open=False),
    Chart("rate", "Learning rate", "", {"optimizer/learning_rate": "learning rate"}, open=False),
    Chart("advantage", "Range of advantages", "Smallest and largest of a step.",
          {"advantage/max": "largest", "advantage/min": "smallest"}, open=False),
    Chart("ratio", "Ratio to the old policy", "π_θ/π_old: mean, smallest and largest.",
          {"policy/ratio_mean": "mean"}, ("policy/ratio_min", "policy/ratio_max"), open=False),
    Chart("passk", "pass@k and maj@k", "On held-out questions with several answers.",
          {r"eval/((?:pass|maj)@\d+)": "{}"}, unit="share", open=False),
    Chart("shares", "Held-out answers", "Shares of answers: finished, with an extracted answer, ambiguous.",
          {"eval/finished_share": "finished", "eval/answered_share": "answered", "eval/ambiguous_share": "ambiguous"},
          unit="share", open=False),
)  # fmt: skip


class Axis:
    """What the horizontal axis of the curves counts: steps, sampled tokens, or hours."""

    def __init__(self, live: LiveRun, name: str) -> None:
        self.name = name if name in AXES else "step"
        if self.name == "step":
            return
        arrays = live.arrays((STEP, "time/step", "time/generate", "time/tokens_per_second", "time/evaluate"))
        self.steps = arrays[STEP][0] if STEP in arrays else np.zeros(0, np.int64)
        with np.errstate(over="ignore"):
            if self.name == "tokens":
                cost = self._of(arrays, "time/generate") * self._of(arrays, "time/tokens_per_second")
            else:
                cost = (self._of(arrays, "time/step") + self._of(arrays, "time/evaluate")) / 3600
        self.order = np.argsort(self.steps, kind="stable")
        self.total = np.cumsum(np.where(np.abs(cost) < _MOST_COST, cost, 0.0)[self.order])

    def _of(self, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str) -> np.ndarray:
        """The values of a metric at the steps; 0 where it was not recorded."""
        found = np.zeros(len(self.steps))
        if name in arrays:
            steps, values = arrays[name]
            known = dict(zip(steps.tolist(), values.tolist(), strict=True))
            found = np.array([known.get(step, 0.0) for step in self.steps.tolist()])
        return found

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """The positions of steps on the axis. A step that was not recorded is where the one before it is."""
        if self.name == "step":
            return steps
        if not len(self.steps):
            return np.zeros(len(steps))
        places = np.searchsorted(self.steps[self.order], steps, side="right")
        return np.where(places > 0, self.total[np.maximum(places, 1) - 1], 0.0)


def payload(
    live: LiveRun, axis: str = "step", first: int | None = None, last: int | None = None, points: int = POINTS
) -> dict[str, Any]:
    """The charts of a run, for the page. `first` and `last`: the range of steps; None: all.

    {"revision", "axis", "axes", "points", "charts": [{"id", "title", "help", "unit", "kind", "open", "curves"}],
    "events"}. A curve has "name", "label", and what `gruppo.ui.live.thin` returns, with "band" (the same for its lower
    and upper end) if there is one. Metrics that no chart names are in a chart of their own, at the end.
    """
    revision = live.poll()
    position = Axis(live, axis)
    names, taken = live.names(), set()
    charts = []
    for chart in CHARTS:
        found = matching(chart.names, names)
        taken |= {name for name, _ in found} | set(chart.band or ())
        if chart.id == "reward" and len(found) == 2 and _equal(live, *(name for name, _ in found)):
            found = found[:1]  # one reward function of weight 1
        if found:
            charts.append({**head(chart), "curves": _curves(live, chart, found, position, (first, last), points)})
    for name in sorted(set(names) - taken):
        chart = Chart(name, name, "", {}, open=False)
        curves = _curves(live, chart, [(name, name.rpartition("/")[2])], position, (first, last), points)
        charts.append({**head(chart), "curves": curves, "other": True})
    return {
        "revision": revision,
        "generation": live.generation,
        "axis": position.name,
        "axes": AXES,
        "points": points,
        "charts": charts,
        "events": marks(live.events, position),
    }


def head(chart: Chart) -> dict[str, Any]:
    """What a page says of a chart, without its curves."""
    return {
        "id": chart.id, "title": chart.title, "help": chart.help, "unit": chart.unit, "kind": chart.kind,
        "open": chart.open,
    }  # fmt: skip


def _equal(live: LiveRun, first: str, second: str) -> bool:
    (steps, values), (others, other_values) = live.arrays((first, second)).values()
    return np.array_equal(steps, others) and np.array_equal(values, other_values, equal_nan=True)


def matching(patterns: Mapping[str, str], names: Sequence[str]) -> list[tuple[str, str]]:
    """The metrics that match, each with its label, in the order of the patterns."""
    found: dict[str, str] = {}
    for pattern, label in patterns.items():
        for name in names:
            match = re.fullmatch(pattern, name)
            if match and name not in found:
                found[name] = label.format(match[1]) if match.groups() else label
    return list(found.items())


def _curves(
    live: LiveRun,
    chart: Chart,
    found: Iterable[tuple[str, str]],
    position: Axis,
    limits: tuple[int | None, int | None],
    points: int,
) -> list[dict[str, Any]]:
    found = list(found)
    arrays = live.arrays([name for name, _ in found] + list(chart.band or ()))
    curves = []
    for number, (name, label) in enumerate(found):
        curve = {"name": name, "label": label, **_thin(arrays[name], position, limits, points)}
        if number == 0 and chart.band and all(end in arrays for end in chart.band):
            curve["band"] = [_thin(arrays[end], position, limits, points) for end in chart.band]
        curves.append(curve)
    return curves


def _thin(
    arrays: tuple[np.ndarray, np.ndarray], position: Axis, limits: tuple[int | None, int | None], points: int
) -> dict[str, Any]:
    steps, values = arrays
    low, high = limits
    if low is not None or high is not None:
        inside = (steps >= (low if low is not None else -np.inf)) & (steps <= (high if high is not None else np.inf))
        steps, values = steps[inside], values[inside]
    return thin(position(steps), values, points)


def marks(events: Sequence[Mapping[str, Any]], position: Axis) -> list[dict[str, Any]]:
    """Warnings and events that are drawn on the curves, the last `_MARKS`."""
    known = [event for event in events if event["step"] is not None][-_MARKS:]
    places = position(np.array([event["step"] for event in known], dtype=np.int64)).tolist()
    return [
        {"x": place, "step": event["step"], "kind": event["kind"], "message": event["message"],
         "warning": event["warning"], "passed": event["passed"]}
        for event, place in zip(known, places, strict=True)
    ]  # fmt: skip
