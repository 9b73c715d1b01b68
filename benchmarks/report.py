"""Write the results of the benchmark as JSON for programs and as Markdown tables for readers."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from works import Work

from gruppo.utils.system import describe

PHASES = ("generation", "reference", "loss and backward", "optimizer", "other")


@dataclass(frozen=True)
class Pair:
    """A step of a peer and the step of gruppo after it.

    Times are in seconds, peaks in bytes since process start. `idle`: the share of a core that the suspended side used.
    `trial`: the pair only served to choose the peer's setting.
    """

    work: str
    peer: str
    setting: str
    our_setting: str
    trial: bool
    peer_seconds: float
    our_seconds: float
    peer_phases: dict[str, float]
    our_phases: dict[str, float]
    peer_peak: int
    our_peak: int
    idle: float

    @property
    def ratio(self) -> float:
        """The peer's time over ours."""
        return self.peer_seconds / self.our_seconds


@dataclass(frozen=True)
class Start:
    """Seconds from the start of a side until it is ready, and from then until the first token of the first request."""

    work: str
    side: str
    setting: str
    load_seconds: float
    first_token: float | None


@dataclass
class Results:
    """All results of a run. `rates`: best matmul rates of the run, in GFLOP/s."""

    threads: int
    quick: bool
    rates: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)

    def share(self, work: Work, seconds: float) -> float:
        """Share of the limit: time of the work at the best rate, divided by the measured time."""
        return self.limit(work) / seconds

    def limit(self, work: Work) -> float:
        """Seconds of the work at the best rate of this machine."""
        return work.flop / (max(self.rates.values()) * 1e9)


def write_results(results: Results, path: Path) -> None:
    """Write the results to `path` as JSON, and the tables next to it as .md."""
    rows = [row for work in results.works for pair in _of(results, work) for row in _rows(results, work, pair)]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(_table(results))


def _of(results: Results, work: Work) -> list[Pair]:
    """All pairs of a work, those in the peer's fastest setting first."""
    return sorted((pair for pair in results.pairs if pair.work == work.name), key=lambda pair: pair.trial)


def _rows(results: Results, work: Work, pair: Pair) -> list[dict[str, Any]]:
    tried = "; tried once" if pair.trial else ""
    ours = f"{pair.our_setting}; beside {pair.peer}, {pair.setting}{tried}"
    return [
        {
            "work": work.name,
            "side": side,
            "setting": setting,
            "seconds": seconds,
            "tokens_per_second": work.tokens / seconds,
            "peak_rss_bytes": peak,
            "share_of_limit": results.share(work, seconds),
            "ratio": pair.ratio,
        }
        for side, setting, seconds, peak in (
            (pair.peer, pair.setting + tried, pair.peer_seconds, pair.peer_peak),
            ("gruppo", ours, pair.our_seconds, pair.our_peak),
        )
    ]


def _table(results: Results) -> str:
    machine = describe(torch.device("cpu"))
    versions = "; ".join(
        f"{side}: {', '.join(f'{name} {version}' for name, version in packages.items())}"
        for side, packages in sorted(results.versions.items())
        if packages
    )
    rates = ", ".join(f"{name} {value:.0f}" for name, value in results.rates.items())
    idle = max(pair.idle for pair in results.pairs)
    revision = f" at revision {machine['git_revision'][:10]}" if machine["git_revision"] else ""
    parts = [
        "# gruppo compared with its peers",
        f"Written by `make bench`{revision}; all rows were measured in one run, with the two sides alternating."
        + (" **Tiny works, only to test the benchmark itself: the figures mean nothing.**" if results.quick else ""),
        f"- machine: {_processor()}, {results.threads} threads per side, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['platform']}, Python {machine['python']}\n"
        f"- versions: {versions}\n"
        f"- matmul rates, GFLOP/s: {rates}\n"
        f"- while one side worked, the other was suspended (it used at most {100 * idle:.1f} % of a core)\n"
        "- memory: peak resident memory since process start, including loading, summed over a side's processes\n"
        "- share of the limit: time of the necessary floating-point operations at the best of these rates, divided "
        "by the measured time; necessary are 2·N operations per token sampled or scored by the reference and 6·N per "
        "token trained on, with every prompt counted once per group and without training on groups that have no "
        "gradient",
        "Checks of the work:\n\n"
        + "".join(f"- {check}\n" for check in results.checks)
        + "- in every timed step, every completion had the length given in the work file, on both sides",
    ]
    for work in results.works:
        parts += _section(results, work)
    parts.append(
        "## Startup\n\nSeconds from process start until it is ready, and from then to the first tokens.\n\n"
        + _starts(results)
    )
    if results.failures:
        parts.append("## Not measured\n\n" + "\n".join(f"- {failure}" for failure in results.failures))
    return "\n\n".join(parts) + "\n"


def _section(results: Results, work: Work) -> list[str]:
    pairs = _of(results, work)
    peers = dict.fromkeys(pair.peer for pair in pairs)
    return [
        f"## {'Work ' if len(work.name) == 1 else ''}{work.name}",
        f"{work.describe()}; {work.flop / 1e12:.2f} TFLOP, {results.limit(work):.2f} s at the limit.",
        *(part for peer in peers for part in _beside(results, work, [pair for pair in pairs if pair.peer == peer])),
    ]


def _beside(results: Results, work: Work, pairs: Sequence[Pair]) -> list[str]:
    """What is said about a work beside one peer."""
    best, tried = [pair for pair in pairs if not pair.trial], [pair for pair in pairs if pair.trial]
    first = best[0]
    ratios = [pair.ratio for pair in best]
    columns = ["side", "setting", "seconds", "tokens/s", "peak, GB", "share of the limit", *PHASES]

    def line(side: str, setting: str, seconds: list[float], peak: int, phases: list[dict[str, float]]) -> list[str]:
        middle = statistics.median(seconds)
        spent = [[step[name] for step in phases if name in step] for name in PHASES]
        return [
            side,
            setting,
            _spread(seconds),
            f"{work.tokens / middle:.0f}",
            f"{peak / 1e9:.2f}",
            f"{results.share(work, middle):.0%}",
            *(f"{statistics.median(times):.2f}" if times else "" for times in spent),
        ]

    def by(pick: Callable[[Pair], Any]) -> list[Any]:
        return [pick(pair) for pair in best]

    rows = [
        line(
            first.peer,
            first.setting,
            by(lambda p: p.peer_seconds),
            max(by(lambda p: p.peer_peak)),
            by(lambda p: p.peer_phases),
        ),
        line(
            "gruppo",
            first.our_setting,
            by(lambda p: p.our_seconds),
            max(by(lambda p: p.our_peak)),
            by(lambda p: p.our_phases),
        ),
    ]
    settings = [
        [
            pair.setting,
            f"{pair.peer_seconds:.2f}",
            f"{pair.our_seconds:.2f}",
            f"{pair.ratio:.2f}",
            f"{pair.peer_peak / 1e9:.2f}",
            " + ".join(f"{name} {pair.peer_phases[name]:.2f}" for name in PHASES if name in pair.peer_phases),
        ]
        for pair in tried
    ]
    return [
        f"**{statistics.median(ratios):.2f} times as fast as {first.peer}** in its fastest setting (median of "
        f"{len(best)} pair{'s' if len(best) > 1 else ''}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}). The table "
        "shows medians, with minimum and maximum in parentheses:",
        _markdown(columns, rows),
        "All settings of the peer that were tried, one pair per setting:",
        _markdown(
            ["setting", f"{first.peer}, s", "gruppo, s", "ratio", "peer's peak, GB", "peer's phases, s"], settings
        ),
    ]


def _starts(results: Results) -> str:
    rows = [
        [
            start.work,
            start.side,
            start.setting,
            f"{start.load_seconds:.1f}",
            "" if start.first_token is None else f"{start.first_token:.2f}",
        ]
        for start in results.starts
    ]
    return _markdown(["work", "side", "setting", "ready, s", "first tokens, s"], rows)


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _processor() -> str:
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")]
    return names[0] if names else platform.machine()
