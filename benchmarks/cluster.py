"""Measure a fleet of engines: sampling, weights, recovery and the tail.

`.venv-cluster/bin/python benchmarks/cluster.py` takes some minutes on two cores and prints a table. `--model`: any
model that gruppo loads. `--engines`, `--prompts`, `--group`, `--tokens`: the size of the work.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from gruppo.config.loading import load_recipe
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.engines.fleet.fleet import Fleet
from gruppo.engines.fleet.opening import open_fleet
from gruppo.engines.native.engine import NativeEngine
from gruppo.models.loading import find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.utils.metrics import Metrics

TEXT = "Write a short story about a castle, a dragon and the river between them."


def sample(engine: Engine, requests: list[Request], tokens: int) -> tuple[float, float, int]:
    """Seconds for all groups, seconds for 90 % of them, and the number of sampled tokens."""
    began, ends, count = time.perf_counter(), [], 0
    for _, group in engine.stream(requests, SamplingParams(1.0, tokens)):
        ends.append(time.perf_counter() - began)
        count += sum(len(completion.token_ids) for completion in group)
    return ends[-1], ends[int(0.9 * (len(ends) - 1))], count


def recovery(fleet: Fleet, requests: list[Request]) -> tuple[float, float]:
    """Seconds from the death of an idle engine until it is noticed, and until its successor may sample."""
    hello = fleet.members[0].hello
    assert hello is not None
    noticed: list[float] = []
    fleet.notify = lambda kind, message: noticed.append(time.perf_counter())
    began = time.perf_counter()
    os.kill(hello.pid, signal.SIGKILL)
    while not noticed or any(member.version != fleet.version for member in fleet.members):
        fleet.generate(requests, SamplingParams(1.0, 1))
    return noticed[0] - began, time.perf_counter() - began


def opened(policy: LanguageModel, engines: int, slots: int, weights: str, stack: ExitStack) -> Fleet:
    """A fleet with the policy's weights."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    recipe = load_recipe({"model": {"name": "m"}, "cluster": {"engines": engines, "weights": weights}})
    fleet = open_fleet(policy, recipe, slots, policy.context, folder, stack)
    fleet.load_weights(policy.weight_source(), 0)
    return fleet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    for name, value in {"engines": 2, "prompts": 16, "group": 8, "tokens": 96, "loads": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    if min(given.engines, given.prompts, given.group, given.tokens, given.loads) < 1:
        parser.error("numbers must be at least 1")
    policy = load_model(find_model(given.model), "auto", "bfloat16")
    ids = tuple(policy.tokenizer(TEXT)["input_ids"])
    requests = [
        Request((*ids, number), [(number, index) for index in range(given.group)]) for number in range(given.prompts)
    ]
    slots, sides = given.prompts * given.group, {"the run's own process": 0, "1 engine": 1}
    for name, count in (sides | {f"{given.engines} engines": given.engines}).items():
        with ExitStack() as stack:
            engine = opened(policy, count, slots, "objects", stack) if count else NativeEngine(policy, slots)
            sample(engine, requests[:2], 8)
            if isinstance(engine, Fleet):
                engine.observe(Metrics())
            whole, most, tokens = sample(engine, requests, given.tokens)
            print(f"{name}: {tokens / whole:.0f} tokens/s, {whole:.1f} s; 90 % of the groups after {most:.1f} s")
            if isinstance(engine, Fleet):
                engine.observe(metrics := Metrics())
                print(f"  idle: {metrics.reduce()['engine/idle_share']:.0%} of the engines' time")
    for way in ("objects", "files"):
        with ExitStack() as stack:
            fleet = opened(policy, given.engines, slots, way, stack)
            seconds = []
            for version in range(given.loads):
                began = time.perf_counter()
                fleet.load_weights(policy.weight_source(), version)
                seconds.append(time.perf_counter() - began)
            fleet.observe(metrics := Metrics())
            size = metrics.reduce()["engine/load_bytes"] or 0.0
            to = f"to {given.engines} engines in {min(seconds):.2f} s, with the probe"
            print(f'weights = "{way}": {size / 1e6:.0f} MB {to}')
            if way == "objects":
                noticed, back = recovery(fleet, requests[:2])
                print(f"an idle engine is killed: noticed after {noticed:.1f} s, replaced after {back:.1f} s")


if __name__ == "__main__":
    main()
