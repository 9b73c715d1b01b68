"""The curves of a run: which metrics belong together, and the numbers that the page draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gruppo.ui.live import LiveRun, means, thin

POINTS = 800  # of a curve
AXES = {"step": "step", "tokens": "sampled tokens", "time": "hours of training and evaluation"}
_TOKENS = ("time/generate", "time/tokens_per_second")  # their product is the number of sampled tokens of a step
_SECONDS = ("time/step", "time/evaluate", "time/reward_model")  # on the lines of steps, evaluations and iterations
_MOST = 1e15  # tokens or hours of a step; more was not measured
_MARKS = 400  # events on the curves, the last ones
_NAME = r"[^/]+(?:/[^/]+)*?"  # of a reward, a task or a set


Limits = tuple[int | None, int | None, int | None]  # first, last and since, see `payload`


@dataclass(frozen=True)
class Chart:
    """Metrics that are drawn together. `names`: patterns of metrics, and the label of each ("{}": what the pattern's
    group matched). `band`: what the names of the lower and upper ends of an interval have instead of `around` at the
    end of the metric's. `kind`: "lines" or "stack". `unit`: "share" (drawn as percent), "bytes", "seconds" or "" (a
    plain number)."""

    id: str
    title: str
    help: str
    names: Mapping[str, str]
    band: tuple[str, ...] = ()
    around: str = ""
    kind: str = "lines"
    unit: str = ""
    open: bool = True


CHARTS = (
    Chart("reward", "Reward", "Mean reward of the completions of a step, and of each reward function (unweighted).",
          {"reward/mean": "reward", rf"reward/(?!log/)({_NAME})/mean": "{}"}),
    Chart("accuracy", "Held-out accuracy", "Accuracy on held-out questions with its 95% interval.",
          {"eval/accuracy": "held out", rf"eval/({_NAME})/accuracy": "{}"},
          ("_low", "_high"), unit="share"),
    Chart("kl", "KL to the reference", "Per token, in nats.", {"policy/kl": "KL"}),
    Chart("entropy", "Entropy", "Of the policy per sampled token, in nats. Near 0 the policy has collapsed.",
          {"policy/entropy": "entropy"}),
    Chart("length", "Completion length", "Sampled tokens per completion: mean, shortest and longest of a step.",
          {"completion/length": "mean"}, ("_min", "_max")),
    Chart("truncated", "Truncated and excluded", "Shares of completions: truncated at max_tokens, excluded because a "
          "reward failed, and equal to another one of their group.",
          {"completion/truncated": "truncated", "reward/excluded": "excluded",
           "groups/duplicate_completions": "duplicates"}, unit="share"),
    Chart("nonzero", "Groups with nonzero advantage", "Only these groups teach something: their rewards differ.",
          {"groups/nonzero_advantage": "nonzero advantage"}, unit="share"),
    Chart("gradient", "Gradient norm", "Before clipping.",
          {"optimizer/gradient_norm": "policy", "value/gradient_norm": "value model",
           "reward_model/gradient_norm": "reward model"}),
    Chart("noise", "Agreement of the gradient", "Cosine between the gradients of two halves of a step, and the share "
          "of the squared gradient that is signal. Near 0, updates are noise.",
          {"gradient/agreement": "agreement", "gradient/signal": "signal"}),
    Chart("clip", "Clipped tokens", "Share of tokens whose ratio is beyond the clip in the direction of their "
          "advantage.",
          {"policy/clipped_high": "above", "policy/clipped_low": "below",
           "engine/importance_capped": "importance capped"}, unit="share"),
    Chart("engine", "Engine against trainer", "Difference of the log-probabilities of the same tokens, in nats.",
          {"engine/logprob_difference_mean": "mean", "engine/logprob_difference_max": "largest"}),
    Chart("staleness", "Staleness", "Steps between the weights that sampled a completion and those that train on it: "
          "with cluster.lag, the lag. If capped importance weights (Clipped tokens) grow with it, lower cluster.lag "
          "or the learning rate.",
          {"staleness/mean": "mean", "staleness/max": "largest"}),
    Chart("idle", "Idle engines", "Share of the engines' time during sampling in which they had nothing to do.",
          {"engine/idle_share": "idle"}, unit="share"),
    Chart("speed", "Tokens per second", "Sampled tokens per second of sampling.",
          {"time/tokens_per_second": "tokens/s"}),
    Chart("phases", "Seconds by phase", "Of a step. With cluster.lag, sampling and rewards ran beside the training of "
          "earlier steps; if the waiting is long, sampling is the longer side.",
          {"time/wait": "waiting", "time/generate": "sampling", "time/reward": "rewards", "time/score": "scoring",
           "time/update": "update", "time/load_weights": "loading weights", "time/write": "writing"}, kind="stack",
          unit="seconds"),
    Chart("memory", "Memory", "Peak so far.", {"memory/peak_bytes": "peak"}, unit="bytes"),
    Chart("loss", "Loss", "See docs/methods.md: with GRPO it stays near 0 while the policy learns.",
          {"loss/total": "loss", "dpo/loss": "DPO", "value/loss": "value model", "reward_model/loss": "reward model"},
          open=False),
    Chart("rate", "Learning rate", "", {"optimizer/learning_rate": "learning rate"}, open=False),
    Chart("advantage", "Range of advantages", "Smallest and largest of a step.",
          {"advantage/max": "largest", "advantage/min": "smallest"}, open=False),
    Chart("ratio", "Ratio to the old policy", "π_θ/π_old: mean, smallest and largest.",
          {"policy/ratio_mean": "mean"}, ("_min", "_max"), "_mean", open=False),
    Chart("passk", "pass@k and maj@k", "On held-out questions with several answers.",
          {r"eval/((?:pass|maj)@\d+)": "{}"}, unit="share", open=False),
    Chart("shares", "Held-out answers", "Shares of answers: finished, with an extracted answer, ambiguous.",
          {"eval/finished_share": "finished", "eval/answered_share": "answered", "eval/ambiguous_share": "ambiguous"},
          unit="share", open=False),
)  # fmt: skip


class Axis:
    """What the horizontal axis of the curves counts: steps, sampled tokens, or hours; steps for any other name."""

    def __init__(self, live: LiveRun, name: str) -> None:
        self.name = name if name in AXES else "step"
        if self.name == "step":
            return
        arrays = live.arrays(_TOKENS if self.name == "tokens" else _SECONDS)
        if self.name == "tokens":
            costs = [_products(*arrays.values())] if len(arrays) == len(_TOKENS) else []
        else:
            costs = [(steps, seconds / 3600) for steps, seconds in arrays.values()]
        steps = np.concatenate([np.zeros(0, np.int64), *(steps for steps, _ in costs)])
        cost = np.concatenate([np.zeros(0), *(values for _, values in costs)])
        order = np.argsort(steps, kind="stable")
        self.steps, self.total = steps[order], np.cumsum(np.where((cost >= 0) & (cost < _MOST), cost, 0.0)[order])

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """The positions of steps on the axis. A step that was not recorded is where the one before it is."""
        if self.name == "step":
            return steps
        places = np.searchsorted(self.steps, steps, side="right")
        return np.concatenate([[0.0], self.total])[places]


def _products(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The product of two metrics, at the steps of the first; NaN where the second was not recorded."""
    known = dict(zip(second[0].tolist(), second[1].tolist(), strict=True))
    with np.errstate(over="ignore"):
        return first[0], first[1] * np.array([known.get(step, np.nan) for step in first[0].tolist()])


def payload(
    live: LiveRun,
    axis: str = "step",
    first: int | None = None,
    last: int | None = None,
    points: int = POINTS,
    since: int | None = None,
) -> dict[str, Any]:
    """The charts of a run, for the page. `first` and `last`: the range of steps; None: all.

    `since`: the field "step" of a payload that the page has, of the same generation, axis and points, and of all steps.
    Then points that are in it are left out of every curve, and "start" is their number; if the "size" of a curve is
    another one in it, the page has to ask for everything.

    {"revision", "axis", "axes", "points", "charts": [{"id", "title", "help", "unit", "kind", "open", "curves"}],
    "events", "step"}. A curve has "name", "label", and what `gruppo.ui.live.thin` returns, with "band" (the same for
    its lower and upper end) if there is one. Metrics that no chart names are in a chart of their own, at the end.
    """
    revision, generation, step = live.poll(), live.generation, live.step
    position, limits = Axis(live, axis), (first, last, since)
    names, taken = live.names(), set()
    charts = []
    for chart in CHARTS:
        found = matching(chart.names, names)
        taken |= {name for name, _ in found} | {end for name, _ in found for end in band_of(chart, name)}
        if chart.id == "reward" and len(found) == 2 and _equal(live, *(name for name, _ in found)):
            found = found[:1]  # one reward function of weight 1
        if found:
            charts.append({**head(chart), "curves": _curves(live, chart, found, position, limits, points)})
    for name in sorted(set(names) - taken):
        chart = Chart(name, name, "", {}, open=False)
        curves = _curves(live, chart, [(name, name.rpartition("/")[2])], position, limits, points)
        charts.append({**head(chart), "curves": curves, "other": True})
    return {
        "revision": revision,
        "generation": generation,
        "step": step,
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


def band_of(chart: Chart, name: str) -> list[str]:
    """The metrics that are the lower and the upper end of an interval around a metric; empty if the chart has none."""
    return [name.removesuffix(chart.around) + end for end in chart.band] if name.endswith(chart.around) else []


def _curves(
    live: LiveRun,
    chart: Chart,
    found: Iterable[tuple[str, str]],
    position: Axis,
    limits: Limits,
    points: int,
) -> list[dict[str, Any]]:
    names, curves = set(live.names()), []
    for name, label in found:
        curve = {"name": name, "label": label, **_points(live, name, position, limits, points)}
        ends = band_of(chart, name)
        if ends and names.issuperset(ends):
            curve["band"] = [_points(live, end, position, limits, points) for end in ends]
        curves.append(curve)
    return curves


def _points(live: LiveRun, name: str, position: Axis, limits: Limits, points: int) -> dict[str, Any]:
    low, high, since = limits
    if since is not None:
        start, size, (steps, values) = live.rest(name, points, since)
        return {**means(position(steps), values, size), "start": start}
    steps, values = live.arrays((name,))[name]
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
