"""Measure [cluster]: engines, ranks, transfers of weights, recovery, the tail of a step, and two machines.

`.venv-cluster/bin/python -m benchmarks.cluster` takes about ten minutes on two idle cores and prints a Markdown table.
`--only "engines; ranks"` measures a part. `--quick` is the smallest size, to see that everything works. `--model`: any
model that gruppo loads. Two machines are network namespaces, for which root is needed.

Completions have fixed lengths with a long tail, so that every side samples the same number of tokens. Sides that are
compared alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from gruppo.actors.runtime import Runtime
from gruppo.config.cluster_section import Cluster
from gruppo.config.loading import load_recipe
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.fleet.fleet import Fleet
from gruppo.engines.fleet.opening import open_fleet
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.loading import find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.runs.reading import read_lines
from gruppo.utils.metrics import Metrics
from tests.machines import TOKEN, actor_class, no_machines, scene

TEXT = "Write a short story about a castle, a dragon and the river between them."
PATIENCE = 10.0  # cluster.patience where something is stopped
LONGEST_RUN = 900.0  # seconds


@dataclass(frozen=True)
class Size:
    """How much work there is. `rounds`: of sides that alternate. `loads`: of the weights. `run`: sampling of runs."""

    prompts: int = 8
    group: int = 4
    tokens: int = 64
    rounds: int = 3
    loads: int = 4
    run: tuple[int, int, int] = (4, 4, 32)


QUICK = Size(prompts=2, group=2, tokens=8, rounds=1, loads=1, run=(2, 2, 8))


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    what: str
    value: str


def requests_of(policy: LanguageModel, size: Size) -> list[Request]:
    """Prompts with completions of fixed lengths: most are short, and a few reach the limit."""
    ids, source = tuple(policy.tokenizer(TEXT)["input_ids"]), random.Random(0)
    return [
        Request(
            (*ids, number),
            [(number, index) for index in range(size.group)],
            [
                min(size.tokens, max(1, round(size.tokens * source.lognormvariate(-1.2, 0.7))))
                for _ in range(size.group)
            ],
        )
        for number in range(size.prompts)
    ]


def params_of(size: Size) -> SamplingParams:
    return SamplingParams(1.0, size.tokens, min_tokens=size.tokens)


def sample(engine: Engine, requests: list[Request], size: Size) -> tuple[list[float], int]:
    """Seconds after which each request was finished, and the number of sampled tokens."""
    began, ends, count = time.perf_counter(), [], 0
    for _, group in engine.stream(requests, params_of(size)):
        ends.append(time.perf_counter() - began)
        count += sum(len(completion.token_ids) for completion in group)
    return ends, count


def opened(policy: LanguageModel, engines: int, slots: int, stack: ExitStack, **cluster: Any) -> Fleet:
    """A fleet with the policy's weights."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    recipe = load_recipe({"model": {"name": "m"}, "cluster": {"engines": engines, **cluster}})
    fleet = open_fleet(policy, recipe, slots, policy.context, folder, stack)
    fleet.load_weights(policy.weight_source(), 0)
    return fleet


def observed(fleet: Fleet) -> dict[str, float]:
    """What the engines have done since the last call."""
    fleet.observe(metrics := Metrics())
    return {name: value or 0.0 for name, value in metrics.reduce().items()}


def engines(model: str, size: Size) -> Iterator[Row]:
    """Two engines against one, and against none; the idle share and the tail."""
    policy = load(model)
    requests, slots = requests_of(policy, size), size.prompts * size.group
    with ExitStack() as stack:
        stack.callback(Runtime(Cluster(engines=3), False, weight_bytes(policy)).close)
        sides: dict[str, Engine] = {"the run's own process": NativeEngine(policy, slots)}
        for count in (1, 2):
            sides[f"{count} engine{'s' * (count > 1)}"] = opened(policy, count, slots, stack)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        idle: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(1 + size.rounds):
            for name, engine in sides.items():
                ends, count = sample(engine, requests if turn else requests[:2], size)
                share = observed(engine)["engine/idle_share"] if isinstance(engine, Fleet) else 0.0
                if turn:  # the first turn warms up
                    speeds[name].append(count / ends[-1])
                    idle[name].append(share)
        for name, values in speeds.items():
            ratios = [value / base for value, base in zip(values, speeds["the run's own process"], strict=True)]
            waits = f"; idle {statistics.median(idle[name]):.0%} of the time" if isinstance(sides[name], Fleet) else ""
            speed, ratio = statistics.median(values), statistics.median(ratios)
            yield Row(f"sampling with {name}", f"{speed:.0f} tokens/s ({ratio:.2f}×){waits}")
        single = [
            Request(request.token_ids, [stream], [request.limit(place, params_of(size))])
            for request in requests
            for place, stream in enumerate(request.streams)
        ]
        for name in ("the run's own process", "2 engines"):
            ends, _ = sample(sides[name], single, size)
            most = sorted(ends)[int(0.9 * (len(ends) - 1))]
            yield Row(
                f"the last 10 % of {len(single)} completions, {name}",
                f"{ends[-1] - most:.1f} s of {ends[-1]:.1f} s ({1 - most / ends[-1]:.0%})",
            )


def transfers(model: str, size: Size) -> Iterator[Row]:
    """Weights by way, and the loss of an engine."""
    policy = load(model)
    requests = requests_of(policy, size)
    for way in ("objects", "files"):
        with ExitStack() as stack:
            fleet = opened(policy, 2, size.prompts * size.group, stack, weights=way, patience=PATIENCE)
            seconds, sent = loads(policy, fleet, size.loads)
            yield Row(f'`weights = "{way}"` to 2 engines', f"{sent / 1e6:.0f} MB in {statistics.median(seconds):.2f} s")
            if way == "objects":
                for number, words in (
                    (signal.SIGKILL, "killed"),
                    (signal.SIGSTOP, f"stopped (patience {PATIENCE:g} s)"),
                ):
                    noticed, back = recovery(fleet, requests[:2], number)
                    yield Row(f"an engine is {words}", f"noticed after {noticed:.1f} s, replaced after {back:.1f} s")


def loads(policy: LanguageModel, fleet: Fleet, count: int) -> tuple[list[float], float]:
    """Seconds of loads, with the probe, and bytes of one."""
    seconds = []
    for version in range(1, count + 1):
        began = time.perf_counter()
        fleet.load_weights(policy.weight_source(), version)
        seconds.append(time.perf_counter() - began)
    return seconds, observed(fleet)["engine/load_bytes"]


def recovery(fleet: Fleet, requests: list[Request], number: signal.Signals) -> tuple[float, float]:
    """Seconds from the signal to an idle engine until its loss is noticed, and until its successor may sample."""
    hello = fleet.members[0].hello
    assert hello is not None
    noticed: list[float] = []
    fleet.notify = lambda kind, message: noticed.append(time.perf_counter())
    began = time.perf_counter()
    os.kill(hello.pid, number)
    while not noticed or any(member.version != fleet.version for member in fleet.members):
        fleet.generate(requests, SamplingParams(1.0, 1))
    return noticed[0] - began, time.perf_counter() - began


def ranks(model: str, size: Size) -> Iterator[Row]:
    """Two ranks against one, and the loss of a rank."""
    alone = Run(model, size)
    alone.wait(lambda: alone.ended)
    yield Row("a step on 1 rank", alone.step())
    pair = Run(model, size, trainers=2)
    pair.wait((pair.out / "checkpoints/step-000002/manifest.json").is_file)
    seconds = pair.after_kill("RankActor")
    yield Row("a step on 2 ranks", pair.step())
    yield Row("a rank is killed after a checkpoint", f"the next step is recorded after {seconds:.1f} s")


def hosts(model: str, size: Size) -> Iterator[Row]:
    """The loss of a reward host."""
    run = Run(model, size, reward_hosts=2)
    run.wait(lambda: run.lines() >= 1)
    seconds = run.after_kill("HostActor")
    yield Row("a reward host is killed", f"the next step is recorded after {seconds:.1f} s; a step takes {run.step()}")


class Run:
    """`gruppo train` in a process of its own: three steps, with a checkpoint after the second."""

    def __init__(self, model: str, size: Size, **cluster: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name) / "run"
        prompts, group, tokens = size.run
        recipe = {
            "run": {"steps": 3, "checkpoint_every": 2},
            "model": {"name": model},
            "task": {"name": "arithmetic"},
            "reward": {"functions": ["last_number"], "workers": 1},
            "method": {"kl_coef": 0.0},
            "sampling": {"prompts_per_step": prompts, "group_size": group, "max_tokens": tokens},
        } | ({"cluster": cluster} if cluster else {})
        file = Path(self.folder.name) / "recipe.toml"
        file.write_text(tomli_w.dumps(recipe))
        self.log = (Path(self.folder.name) / "log.txt").open("w+")
        command = [sys.executable, "-m", "gruppo.cli.main", "train", str(file), "--out", str(self.out)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.peaks: dict[str, int] = {}

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def lines(self) -> int:
        """Steps that are recorded."""
        file = self.out / "metrics.jsonl"
        return file.read_text().count("\n") if file.is_file() else 0

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for something, and watch the memory meanwhile."""
        deadline = time.monotonic() + LONGEST_RUN
        while not condition():
            if self.process.poll() or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"the run has failed:\n{self.log.read()}")
            for role, process in self.roles():
                with suppress(psutil.Error):
                    self.peaks[role] = max(self.peaks.get(role, 0), process.memory_info().rss)
            time.sleep(0.05)

    def roles(self) -> list[tuple[str, psutil.Process]]:
        """The leader, and the actors of Ray by their class."""
        found = []
        with suppress(psutil.Error):
            leader = psutil.Process(self.process.pid)
            children = leader.children(recursive=True)
            found = [("leader", leader), *((actor_class(child), child) for child in children)]
        return [(role, process) for role, process in found if role == "leader" or role.endswith("Actor")]

    def after_kill(self, role: str) -> float:
        """Kill an actor of a class. Returns the seconds until the next step is recorded, and lets the run end."""
        victim = next(process for name, process in self.roles() if name == role)
        before, began = self.lines(), time.perf_counter()
        victim.kill()
        self.wait(lambda: self.lines() > before)
        seconds = time.perf_counter() - began
        self.wait(lambda: self.ended)
        return seconds

    def step(self) -> str:
        """Seconds of a step but the first, and the peak of the memory of each process that trains."""
        lines = read_lines(self.out / "metrics.jsonl")
        seconds = statistics.median(line["time/step"] for line in lines[1:])
        names = {"leader": "rank 0", "RankActor": "rank 1"}
        peaks = [f"{name} {self.peaks[role] / 1e9:.1f} GB" for role, name in names.items() if role in self.peaks]
        return f"{seconds:.1f} s; at most {', '.join(peaks)}"


def machines(model: str, size: Size) -> Iterator[Row]:
    """Two machines, of which each has an engine."""
    if why := no_machines():
        yield Row("two machines", f"skipped: {why}")
        return
    with scene(two=True) as two:
        command = [sys.executable, "-m", "benchmarks.cluster", "--model", model, "--loads", str(size.loads)]
        command += ["--address", two.address, "--link", two.home.link]
        done = subprocess.run(two.home.command(*command), env=os.environ | TOKEN, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    seconds, sent = statistics.median(found["seconds"]), found["sent"] / size.loads
    yield Row(
        "weights to 2 engines, of which one is on another machine",
        f"{found['bytes'] / 1e6:.0f} MB in {seconds:.2f} s; {sent / 1e6:.0f} MB over the network",
    )


def on_first_machine(model: str, count: int, address: str, link: str) -> None:
    """Loads of the weights, and the bytes that leave this machine; as JSON."""
    policy, counter = load(model), Path(f"/sys/class/net/{link}/statistics/tx_bytes")
    with ExitStack() as stack:
        fleet = opened(policy, 2, 8, stack, address=address)
        before = int(counter.read_text())
        seconds, size = loads(policy, fleet, count)
        print(json.dumps({"seconds": seconds, "bytes": size, "sent": int(counter.read_text()) - before}))


def load(model: str) -> LanguageModel:
    return load_model(find_model(model))


def weight_bytes(policy: LanguageModel) -> int:
    return sum(weight.nbytes for weight in policy.weights().values())


PARTS: dict[str, Callable[[str, Size], Iterator[Row]]] = {
    "engines": engines, "transfers": transfers, "ranks": ranks, "hosts": hosts, "machines": machines
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quick", action="store_true", help="the smallest size")
    parser.add_argument("--only", default="; ".join(PARTS), help="parts, separated by semicolons")
    for name in ("--loads", "--address", "--link"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # of the process on the first of two machines
    given = parser.parse_args()
    if given.address:
        on_first_machine(given.model, int(given.loads), given.address, given.link)
        return
    size, began = QUICK if given.quick else Size(), time.monotonic()
    print("| what | measured |\n| --- | --- |", flush=True)
    for name in (name.strip() for name in given.only.split(";")):
        for row in PARTS[name](given.model, size):
            print(f"| {row.what} | {row.value} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
