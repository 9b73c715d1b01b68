"""Measure how time and memory of a step grow: `.venv/bin/python benchmarks/growth.py`.

One axis is varied at a time around a middle point: group size, prompt length, completion length, model width. Every
point is a separate process that does two steps of gruppo's loop, of which the second is timed. The lines are
predictions: memory by `gruppo.training.memory_estimate`; seconds by counted floating-point operations at one rate for
sampling and one for training, both taken from the middle point. Then it measures how sampling speed depends on the
number of concurrent completions, what uneven lengths cost, and one large group against as many separate sequences.
Writes benchmarks/growth.json and docs/growth.svg. With `--uneven ROUNDS`, only uneven lengths are measured, in that
many rounds, and only printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "gruppo"
from bench import Side  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from works import MODEL, SEED, Work, make_random_model, parameters_of  # noqa: E402

from gruppo.models.loading import ModelSource, find_model  # noqa: E402

HERE = Path(__file__).parent
MIDDLE = {"prompts": 1, "group": 8, "prompt": 128, "completion": 64}
AXES: dict[str, tuple[str, Sequence[int]]] = {
    "group": ("group size", (1, 2, 4, 8, 16, 32, 64)),
    "prompt": ("prompt tokens", (32, 64, 128, 256, 512, 1024)),
    "completion": ("completion tokens", (32, 64, 128, 256, 512)),
    "width": ("hidden size, 12 layers", (256, 512, 768, 1024)),
}


def make_work(
    source: ModelSource, count: int, group: int, prompt: int, lengths: list[list[int]], name: str = "growth"
) -> Work:
    """A work of `count` prompts with exactly `prompt` tokens of plain text; rewards differ in groups of 2 or more."""
    texts, prompts = [], []
    for place in range(count):
        texts.append(text_of(source, prompt, place))
        prompts.append(list(source.tokenizer(texts[-1])["input_ids"]))
    end = int(source.tokenizer.eos_token_id)
    return Work(
        name=name,
        model=source.location,
        parameters=parameters_of(source.location),
        messages=texts,
        prompts=prompts,
        lengths=lengths,
        rewards=[[float(number % 2) for number in range(group)] for _ in range(count)],
        max_tokens=max(map(max, lengths)),
        kl_coef=0.04,  # so that a group of one is trained on too
        end_id=end,
        end_ids=[end],
    )


def text_of(source: ModelSource, tokens: int, seed: int) -> str:
    """Words that have exactly `tokens` tokens in total."""
    source_of_words = random.Random(SEED + seed)
    words = ["river", "castle", "winter", "garden", "number", "story", "water", "music", "house", "light"]
    text = "the" + "".join(" " + source_of_words.choice(words) for _ in range(tokens - 1))
    assert len(source.tokenizer(text)["input_ids"]) == tokens
    return text


def attention_flop(config: Any, work: Work) -> float:
    """Floating-point operations of attention, forward: a completion attends to its prompt and its earlier tokens."""
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = 0.0
    for prompt, lengths in zip(work.prompts, work.lengths, strict=True):
        pairs += len(prompt) ** 2 / 2 + sum(len(prompt) * length + length**2 / 2 for length in lengths)
    return 4.0 * width * config.num_hidden_layers * pairs


def flop(config: Any, work: Work) -> tuple[float, float]:
    """Floating-point operations of sampling and of a training pass."""
    tokens = sum(len(prompt) + sum(lengths) for prompt, lengths in zip(work.prompts, work.lengths, strict=True))
    attention = attention_flop(config, work)
    return 2.0 * work.parameters * tokens + attention, 6.0 * work.parameters * tokens + 3.0 * attention


class Growth:
    """Runs gruppo's side on works written into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        threads = str(len(os.sched_getaffinity(0)))
        self.environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}

    def step(self, work: Work, mode: str = "run") -> dict[str, Any]:
        """Measure the second step of a work, with the measured and the predicted peak memory."""
        path = self.folder / "work.json"
        path.write_text(json.dumps(asdict(work)))
        command = [sys.executable, str(HERE / "sides/ours.py"), str(path), mode]
        with Side("gruppo", command, self.environment, self.folder / "log", spare=False) as side:
            side.call("warm")
            step = side.call("step")
            return {**step, "peak_bytes": side.peak_bytes(), "predicted_bytes": side.ready.get("forecast_bytes")}

    def point(self, source: ModelSource, axis: str, value: int) -> dict[str, Any]:
        """Measure one point of an axis."""
        shape = MIDDLE | ({axis: value} if axis in MIDDLE else {})
        lengths = [[shape["completion"]] * shape["group"] for _ in range(shape["prompts"])]
        work = make_work(source, shape["prompts"], shape["group"], shape["prompt"], lengths)
        step = self.step(work)
        sampling, training = flop(source.config, work)
        return {
            "axis": axis,
            "value": value,
            "generation_seconds": step["phases"]["generation"],
            "training_seconds": step["phases"]["loss and backward"],
            "generation_flop": sampling,
            "training_flop": training,
            "peak_bytes": step["peak_bytes"],
            "predicted_bytes": step["predicted_bytes"],
        }


def measure(growth: Growth) -> dict[str, Any]:
    """Measure all points, with predictions, and the three additional comparisons."""
    source = find_model(MODEL)
    points = []
    for axis, (_, values) in AXES.items():
        for value in values:
            chosen = source
            if axis == "width":
                path = growth.folder / f"wide-{value}"
                make_random_model(path, value)
                chosen = find_model(str(path))
            points.append(growth.point(chosen, axis, value))
            print(json.dumps(points[-1]), flush=True)
    middle = next(point for point in points if point["axis"] == "group" and point["value"] == MIDDLE["group"])
    for point in points:
        for phase in ("generation", "training"):
            rate = middle[f"{phase}_flop"] / middle[f"{phase}_seconds"]
            point[f"predicted_{phase}_seconds"] = point[f"{phase}_flop"] / rate
    return {
        "command": "benchmarks/growth.py",
        "points": points,
        "in_flight": in_flight(growth, source),
        "uneven": uneven(growth, source),
        "group": grouped(growth, source),
    }


def in_flight(growth: Growth, source: ModelSource) -> dict[str, float]:
    """Tokens per second by number of concurrent completions of 64 tokens, eight per prompt."""
    rates = {}
    for prompts in (8, 16, 32, 64):
        lengths = [[64] * 8] * prompts
        work = replace(make_work(source, prompts, 8, 49, lengths, "generation"), slots=8 * prompts)
        rates[str(8 * prompts)] = sum(map(sum, lengths)) / growth.step(work)["seconds"]
    return rates


def uneven(growth: Growth, source: ModelSource, rounds: int = 2) -> dict[str, Any]:
    """Tokens per second with lengths uniform over 8..256 and with as many tokens in equal lengths; 64 slots.

    Both are measured once per round, alternately; the fastest counts.
    """
    group, count = 8, 24
    source_of_lengths = random.Random(SEED)
    spread = [[source_of_lengths.randint(8, 256) for _ in range(group)] for _ in range(count)]
    mean = round(sum(map(sum, spread)) / (group * count))
    even = [[mean] * group for _ in range(count)]
    seconds: dict[str, list[float]] = {"even": [], "uneven": []}
    tokens = {"even": sum(map(sum, even)), "uneven": sum(map(sum, spread))}
    for _ in range(rounds):
        for name, lengths in (("even", even), ("uneven", spread)):
            work = replace(make_work(source, count, group, 49, lengths, "generation"), slots=64)
            seconds[name].append(growth.step(work)["seconds"])
    rates = {f"{name}_tokens_per_second": tokens[name] / min(times) for name, times in seconds.items()}
    share = rates["uneven_tokens_per_second"] / rates["even_tokens_per_second"]
    return {**rates, "share": share, "seconds": seconds}


def grouped(growth: Growth, source: ModelSource) -> dict[str, float]:
    """Seconds per step with 64 completions of one 512-token prompt, and with 64 prompts of one completion each."""
    group, separate = (
        growth.step(make_work(source, count, size, 512, [[64] * size] * count)) for count, size in ((1, 64), (64, 1))
    )
    seconds = {"group_of_64_seconds": group["seconds"], "separate_seconds": separate["seconds"]}
    return {**seconds, "share": group["seconds"] / separate["seconds"]}


def plot(results: dict[str, Any], out: Path) -> None:
    """One column per axis: seconds of both phases above, memory below; dots are measured, lines predicted."""
    figure, rows = plt.subplots(2, len(AXES), figsize=(11, 5), layout="constrained", sharex="col")
    for column, (axis, (title, _)) in enumerate(AXES.items()):
        points = [point for point in results["points"] if point["axis"] == axis]
        values = [point["value"] for point in points]
        for phase, color in (("generation", "tab:blue"), ("training", "tab:orange")):
            rows[0, column].plot(values, [point[f"{phase}_seconds"] for point in points], "o", color=color, label=phase)
            rows[0, column].plot(values, [point[f"predicted_{phase}_seconds"] for point in points], "-", color=color)
        rows[1, column].plot(values, [point["peak_bytes"] / 1e9 for point in points], "o", color="tab:green")
        rows[1, column].plot(values, [point["predicted_bytes"] / 1e9 for point in points], "-", color="tab:green")
        rows[0, column].set(xscale="log", yscale="log")
        rows[1, column].set(xscale="log", ylim=(0, None), xlabel=title, xticks=values, xticklabels=values)
        rows[1, column].minorticks_off()
        for row in rows[:, column]:
            row.grid(alpha=0.3)
    rows[0, 0].set_ylabel("seconds per step")
    rows[1, 0].set_ylabel("peak memory, GB")
    rows[0, 0].legend()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how time and memory of a step grow.")
    parser.add_argument(
        "--uneven", type=int, metavar="ROUNDS", help="measure only uneven lengths, and print the result"
    )
    given = parser.parse_args()
    if given.uneven:
        with tempfile.TemporaryDirectory(prefix="gruppo-growth-") as folder:
            print(json.dumps(uneven(Growth(Path(folder)), find_model(MODEL), given.uneven), indent=1))
        return
    with tempfile.TemporaryDirectory(prefix="gruppo-growth-") as folder:
        results = measure(Growth(Path(folder)))
    (HERE / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, HERE.parent / "docs/growth.svg")
    print(json.dumps({name: results[name] for name in ("in_flight", "uneven", "group")}, indent=1))


if __name__ == "__main__":
    main()
