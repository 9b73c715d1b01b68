"""The cases of `make torture-cluster`, and the faults of their runs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.torture import CALLS as OF_ONE_PROCESS

MOST = 2  # faults of a run that have the same kind of victim: after three in a row, runs end on purpose
OF_THE_FLEET = {
    "starting": "gruppo.engines.fleet.member.Member.start",
    "loading weights": "gruppo.engines.fleet.member.Member.send_weights",
    "probing": "gruppo.engines.fleet.member.Member.send_probe",
    "sampling": "gruppo.engines.fleet.member.Member.send_piece",
}
PHASES = ("loading", "restoring", "sampling", "rewarding", "evaluating", "computing a loss", "updating",
          "writing a checkpoint", "writing a table", "writing a line")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`cluster`: the table of the recipe. `victims`: what may be lost. `changes`: to the recipe of torture.py.
    `launched`: ranks are started by a launcher, as torchrun does, and not by the run; their death ends it."""

    cluster: dict[str, Any]
    victims: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    launched: int = 1

    @property
    def local(self) -> bool:
        """Whether a run starts a Ray of its own."""
        return self.cluster.get("address") == "local"

    @property
    def fatal(self) -> set[str]:
        """Victims without which a run ends."""
        return {"leader", "rank"} if self.launched > 1 else {"leader"}

    @property
    def calls(self) -> dict[str, str]:
        """Phase -> the function whose calls are counted in the leader."""
        calls = {name: OF_ONE_PROCESS[name] for name in PHASES}
        return calls | (OF_THE_FLEET if self.cluster.get("engines") else {})


LAGGED = {"method__name": "dapo", "method__kl_coef": None, "method__tis_cap": 2.0}
CASES = {
    "engines": Case({"engines": 2}, ("engine", "engine", "leader"), {"method__inner_updates": 2}),
    "ray of the run": Case({"engines": 2, "address": "local", "weights": "files"}, ("engine", "leader")),
    "launched ranks": Case({"trainers": 2, "address": "local"}, ("rank", "rank", "leader"), launched=2),
    "ranks": Case({"trainers": 2}, ("rank", "rank", "leader")),
    "ranks and engines": Case({"trainers": 2, "engines": 2}, ("rank", "engine", "leader")),
    "reward hosts": Case({"reward_hosts": 2}, ("reward host", "reward host", "leader")),
    "ahead": Case({"engines": 2, "lag": 2}, ("engine", "engine", "leader"), LAGGED),
    "machines": Case({"engines": 2}, ("machine", "machine", "engine", "leader")),
}
WAYS = {
    "engine": ("killed", "stopped"),
    "rank": ("killed", "stopped"),
    "reward host": ("killed", "stopped"),
    "leader": ("killed",),  # stopped, it would stay so for good
    "machine": ("killed", "killed, and back", "unplugged", "unplugged for 3 s"),
}


@dataclass(frozen=True)
class Fault:
    """What happens to whom, and when. `phase`: "time", or one of the case's calls. `moment`: seconds, or the number of
    the call, counted from 1. `which`: 0 to 1, chooses among several victims."""

    victim: str
    way: str
    phase: str
    moment: float
    after: bool
    which: float

    def __str__(self) -> str:
        when = f"after {self.moment:.1f} s" if self.phase == "time" else f"{self.phase} {self.moment:g}"
        return f"{self.victim} {self.way} at {when}{'+' * self.after}"


def plan(name: str, tally: Mapping[str, int], seconds: float, seed: int, run: int) -> list[Fault]:
    """The faults of a run: one to three, determined by the seed and the number of the run alone, but for what the
    undisturbed run took: `seconds`, and the calls of each phase in `tally`."""
    case = CASES[name]
    kinds = [(victim, way) for victim in case.victims for way in WAYS[victim]]
    random.Random(f"{seed} {name}").shuffle(kinds)
    source = random.Random(f"{seed} {name} {run}")
    first, faults = sum(1 + earlier % 3 for earlier in range(run)), list[Fault]()
    for place in range(first, first + 1 + run % 3):
        victim, way = kinds[place % len(kinds)]
        known = {phase for phase in case.calls if tally.get(phase)}
        if [fault.victim for fault in faults].count(victim) == MOST:
            break
        if victim not in ("leader", "rank"):
            known -= {"loading"}  # it is not there yet
        if victim != "engine":
            known -= {"starting"}  # of an engine
        if any(fault.victim in case.fatal for fault in faults):
            known |= {"restoring"}
        phase, after = source.choice(["time", *(3 * sorted(known))]), source.random() < 0.5
        if phase == "time":
            moment = source.uniform(0.2, 1) * seconds
        else:
            moment = source.randint(1, max(1, tally.get(phase, 1) // source.choice([1, 3, 10])))
        faults.append(Fault(victim, way, phase, moment, after and phase != "time", source.random()))
    return faults
