"""Plot the held-out accuracy of one or more runs over steps as an SVG: plot_runs.py OUT.svg RUN [RUN …]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "gruppo"
from matplotlib import pyplot as plt  # noqa: E402


def main() -> None:
    out, *folders = (Path(argument) for argument in sys.argv[1:])
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        points = [line for line in lines if "eval/accuracy" in line]
        steps = [line["step"] for line in points]
        (curve,) = axes.plot(steps, [line["eval/accuracy"] for line in points], marker="o", label=folder.name)
        axes.fill_between(
            steps,
            [line["eval/accuracy_low"] for line in points],
            [line["eval/accuracy_high"] for line in points],
            color=curve.get_color(),
            alpha=0.12,
            linewidth=0,
        )
    axes.set(xlabel="step", ylabel="accuracy, 256 held-out questions", ylim=(0, 1))
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(title="with 95 % intervals")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
