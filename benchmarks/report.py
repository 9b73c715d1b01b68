"""What the benchmark measured, as a list for programs and as a table for readers."""

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
    """A step of a peer and the step of ours after it. Seconds; bytes since each process began; `idle`: the share of a
    core that the side which had to wait used; `trial`: only to choose the peer's setting."""

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
    """How long a side took from its start to being ready, and from then to the first token of a first request."""

    work: str
    side: str
    setting: str
    load_seconds: float
    first_token: float | None


@dataclass
class Results:
    """All of a run. `rates`: the best of the run, GFLOP/s."""

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
        """The work at the best bfloat16 rate, over the time taken."""
        return work.flop / (self.rates["bfloat16"] * 1e9) / seconds


def write_results(results: Results, path: Path) -> None:
    """The list as JSON, and the table beside it."""
    rows = [row for work in results.works for pair in _of(results, work) for row in _rows(results, work, pair)]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(_table(results))


def _of(results: Results, work: Work) -> list[Pair]:
    """A work's pairs, those in the best setting first."""
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
    packages = "; ".join(
        f"{side}: {', '.join(f'{name} {version}' for name, version in held.items())}"
        for side, held in sorted(results.versions.items())
        if held
    )
    rates = ", ".join(f"{name} {value:.0f}" for name, value in results.rates.items())
    idle = max(pair.idle for pair in results.pairs)
    revision = f" at revision {machine['git_revision'][:10]}" if machine["git_revision"] else ""
    parts = [
        "# gruppo beside its peers",
        f"Made by `make bench`{revision}; each row was measured in one run, alternately with the row below it."
        + (" **Tiny works: only to try the machinery, the figures mean nothing.**" if results.quick else ""),
        f"- machine: {_processor()}, {results.threads} threads a side, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['platform']}, Python {machine['python']}\n"
        f"- versions: {packages}\n"
        f"- matrix products, GFLOP/s: {rates}\n"
        f"- while one side worked, the other stood still (it used at most {100 * idle:.1f} % of a core)\n"
        "- memory: the most that was resident since the process began, loading included, summed over a side's "
        "processes\n"
        "- share of the limit: floating-point work with each prompt once a group (2·N a token sampled or scored by the "
        "reference, 6·N a token trained on, groups without a signal not trained on), at the best bfloat16 rate, over "
        "the time",
        "Checks of the work:\n\n"
        + "".join(f"- {each}\n" for each in results.checks)
        + "- in every timed step each completion had the length of the work file on both sides",
    ]
    for work in results.works:
        parts += _section(results, work)
    parts.append(
        "## Starts\n\nSeconds from the start of a process until it is ready, and then to its first tokens.\n\n"
        + _starts(results)
    )
    if results.failures:
        parts.append("## Did not finish\n\n" + "\n".join(f"- {each}" for each in results.failures))
    return "\n\n".join(parts) + "\n"


def _section(results: Results, work: Work) -> list[str]:
    pairs = _of(results, work)
    best, tried = [pair for pair in pairs if not pair.trial], [pair for pair in pairs if pair.trial]
    first = best[0]
    ratios = [pair.ratio for pair in best]
    columns = ["side", "setting", "seconds", "tokens/s", "peak, GB", "share of the limit", *PHASES]

    def line(side: str, setting: str, seconds: list[float], peak: int, phases: list[dict[str, float]]) -> list[str]:
        middle = statistics.median(seconds)
        spent = [[each[name] for each in phases if name in each] for name in PHASES]
        return [
            side,
            setting,
            _spread(seconds),
            f"{work.tokens / middle:.0f}",
            f"{peak / 1e9:.2f}",
            f"{results.share(work, middle):.0%}",
            *(f"{statistics.median(each):.2f}" if each else "" for each in spent),
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
        f"## {'Work ' if len(work.name) == 1 else ''}{work.name}",
        f"{work.describe()}; {work.flop / 1e12:.2f} TFLOP, {work.flop / results.rates['bfloat16'] / 1e9:.2f} s at the "
        "limit.",
        f"**{statistics.median(ratios):.2f} times as fast as {first.peer}** in its best setting (median of {len(best)} "
        f"pairs: {', '.join(f'{each:.2f}' for each in ratios)}). Medians; in brackets the least and the most:",
        _markdown(columns, rows),
        "Settings of the peer, one pair each:",
        _markdown(["setting", f"{first.peer}, s", "gruppo, s", "ratio", "its peak, GB", "its phases, s"], settings),
    ]


def _starts(results: Results) -> str:
    rows = [
        [
            each.work,
            each.side,
            each.setting,
            f"{each.load_seconds:.1f}",
            "" if each.first_token is None else f"{each.first_token:.2f}",
        ]
        for each in results.starts
    ]
    return _markdown(["work", "side", "setting", "ready", "first tokens"], rows)


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
