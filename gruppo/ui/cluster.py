"""What the top of a run's page says of its ranks and engines."""

from __future__ import annotations

from dataclasses import dataclass

from gruppo.ui.catalog import Card
from gruppo.ui.live import LiveRun


@dataclass(frozen=True)
class Tile:
    """The processes of a run, and facts about them, as words. `missing`: more engines were lost than are back."""

    processes: str
    facts: tuple[str, ...]
    missing: bool


def cluster_tile(card: Card, live: LiveRun) -> Tile | None:
    """The ranks and engines of a run with [cluster], as of its last step; None for a single process without a lag.

    Engines: the newest weights that one has, how many have older ones, and the share of their time that is idle. Then
    the lag and the mean staleness, how many engines were lost and are back, and how often ranks started again.
    """
    if card.ranks == 1 and not card.engines and not card.lag:
        return None
    lost, back = (sum(event["kind"] == kind for event in live.events) for kind in ("engine_lost", "engine_back"))
    processes = [_count(card.ranks, "rank"), *([_count(card.engines, "engine")] if card.engines else [])]
    facts = [*_engines(card, live), *_ages(card, live)]
    if lost or back:
        facts.append(f"{_count(lost, 'engine')} lost, {back:,} back")
    if restarts := sum(event["kind"] == "rank_lost" for event in live.events):
        facts.append(f"ranks started again {'once' if restarts == 1 else f'{restarts:,} times'}")
    return Tile(", ".join(processes), tuple(facts), lost > back)


def _engines(card: Card, live: LiveRun) -> list[str]:
    numbers = range(min(card.engines, len(live.names())))  # no more than there are metrics, whatever a recipe says
    known = [version for number in numbers if (version := live.last(f"engine/{number}/version")) is not None]
    facts = []
    if known:
        behind = sum(version < max(known) for version in known)
        facts.append(f"weights of step {max(known):.15g}" + (f", {behind} of {len(known)} behind" if behind else ""))
    idle = live.last("engine/idle_share")
    if idle is not None and 0 <= idle <= 1:
        facts.append(f"engines {idle:.0%} idle")
    return facts


def _ages(card: Card, live: LiveRun) -> list[str]:
    if not card.lag:
        return []
    staleness = live.last("staleness/mean")
    return [f"lag {card.lag:,}" + ("" if staleness is None else f", staleness {staleness:.3g}")]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
