"""Predictions for published runs, beside what was published. The runs and their sources are in published.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import median
from typing import Any

import yaml

from gruppo.planning.assumptions import Assumptions
from gruppo.planning.devices import read_cluster
from gruppo.planning.lengths import lengths_with_mean, smallest
from gruppo.planning.placement import Kind, Work, engine_sizes, place
from gruppo.planning.shape import ModelShape, shape_of_config
from gruppo.planning.trainer import Passes, State, training_time

_SHARED = State(0.0, 0.0)  # whether a published run fits is not in question
_MILLION = 1e6


@dataclass(frozen=True)
class Comparison:
    """A published run: predicted and published seconds of the step and of its phases, by name.

    `mean_tokens`: mean completion length. `inferred`: it was chosen so that the updates take as long as published.
    """

    name: str
    source: str
    predicted: dict[str, float]
    published: dict[str, float]
    mean_tokens: float
    inferred: bool
    note: str

    def error(self, phase: str = "step") -> float:
        """Predicted by published time, minus 1."""
        return self.predicted[phase] / self.published[phase] - 1


def compare_published(assumed: Assumptions | None = None) -> list[Comparison]:
    """Predict every run of published.yaml with the same assumptions, except for lengths, which the runs give."""
    text = resources.files("gruppo.planning").joinpath("published.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    shapes = {name: shape_of_config(config, name) for name, config in table["models"].items()}
    chosen = assumed or Assumptions()
    return [_compare(run, shapes[run["model"]], table["sources"][run["source"]], chosen) for run in table["runs"]]


def ratios(comparisons: Sequence[Comparison]) -> tuple[float, float, float]:
    """Predicted by published step times: the smallest, the median, and the largest."""
    found = [1 + comparison.error() for comparison in comparisons]
    return min(found), median(found), max(found)


def _compare(run: dict[str, Any], shape: ModelShape, source: str, assumed: Assumptions) -> Comparison:
    published = {name: float(seconds) for name, seconds in run["published"].items()}
    note = run.get("note", "")
    if "sequence" in run:
        cluster, context = read_cluster(run["devices"]), run["sequence"] / 2
        passes = Passes(scores=0, updates=1, recompute=run["recompute"])
        time = training_time(shape, cluster, cluster.devices, passes, _MILLION, context, assumed)
        seconds = {"step": _MILLION / published["tokens_per_second"]}
        return Comparison(run["name"], source, {"step": time.seconds}, seconds, run["sequence"], False, note)
    inferred = "mean_tokens" not in run
    mean = _mean_from_updates(run, shape, assumed) if inferred else float(run["mean_tokens"])
    predicted = _predict(run, shape, assumed, mean)
    if inferred:  # the updates are equal by construction
        for times in (predicted, published):
            times["step"] -= times.pop("updates")
    kept = {phase: predicted[phase] for phase in published}
    return Comparison(run["name"], source, kept, published, mean, inferred, note)


def _work(run: dict[str, Any], assumed: Assumptions, mean: float) -> Work:
    return Work(
        completions=run["completions"],
        prompts=run["prompts"],
        prompt_copies=run["completions"],
        prompt=run["prompt_tokens"],
        longest=run["max_tokens"],
        lengths=lengths_with_mean(mean, run["max_tokens"], assumed.spread),
        passes=Passes(scores=run["scores"], updates=1, recompute=run["recompute"]),
        state=_SHARED,
    )


def _predict(run: dict[str, Any], shape: ModelShape, assumed: Assumptions, mean: float) -> dict[str, float]:
    """Predicted seconds of the step and its phases."""
    cluster, work = read_cluster(run["devices"]), _work(run, assumed, mean)
    kind: Kind = "ahead" if "trainers" in run else "colocated"
    trainers = run.get("trainers", cluster.devices)
    sizes = [run["engine_devices"]] if "engine_devices" in run else engine_sizes(cluster)
    options = [place(shape, cluster, work, assumed, kind, trainers, size) for size in sizes]
    placed = min((option for option in options if option), key=lambda option: option.step, default=None)
    assert placed is not None, run["name"]
    return {
        "step": placed.step,
        "sampling": placed.sampling_seconds,
        "scores": placed.training.scores,
        "updates": placed.training.updates,
    }


def _mean_from_updates(run: dict[str, Any], shape: ModelShape, assumed: Assumptions) -> float:
    """The mean completion length with which the updates are predicted to take as long as published."""
    cluster = read_cluster(run["devices"])

    def seconds(mean: float) -> float:
        work = _work(run, assumed, mean)
        context = work.lengths.training_context(work.prompt)
        passes = work.passes
        return training_time(shape, cluster, cluster.devices, passes, work.training_tokens, context, assumed).updates

    return smallest(1.0, float(run["max_tokens"]), lambda mean: seconds(mean) >= run["published"]["updates"])
