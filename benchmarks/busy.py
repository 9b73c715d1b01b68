"""Measure a step beside other work: alone, and beside k processes that never rest.

`.venv/bin/python benchmarks/busy.py` takes about fifteen minutes on two cores. The step is that of step_profile.py, in
a process of its own for each setting of OpenMP, with sides alternating. A fair share of c cores beside k processes is
c / (c + k) of them, so a fair step takes (c + k) / c times as long as alone.

--settings: names below. --busy: numbers of processes beside it. --rounds: measurements of each side. --prompts: of a
step; a slow machine needs fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "gruppo": {},  # see gruppo/utils/torch_settings.py
    "long": {"GOMP_SPINCOUNT": "300000"},  # what OpenMP does when nothing is set, in iterations
    "20000": {"GOMP_SPINCOUNT": "20000"},
    "5000": {"GOMP_SPINCOUNT": "5000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPIN = "while True: pass"


@contextmanager
def beside(count: int) -> Iterator[None]:
    """Processes that never rest."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measured(setting: str, busy: int, model: str, prompts: int) -> dict[str, float]:
    """Seconds of each phase of a step with a setting, beside busy processes, after one to warm up."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    folder = str(Path(__file__).parent)
    command = [sys.executable, __file__, "--phases", "--model", model, "--prompts", str(prompts)]
    environment = {**kept, **SETTINGS[setting], "PYTHONPATH": os.pathsep.join((folder, kept.get("PYTHONPATH", "")))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()  # it has loaded the model and done a step
        with beside(busy):
            child.stdin.write("\n")
            child.stdin.flush()
            seconds: dict[str, float] = json.loads(child.stdout.readline())
    return seconds


def time_phases(model: str, prompts: int) -> None:
    """Do a step, wait for a line, and print the seconds of each phase of another step."""
    import step_profile

    step_profile.PROMPTS = prompts
    steps = step_profile.phases(model)
    for work in steps.values():
        work()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = {}
    for name, work in steps.items():
        began = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - began
    print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", default=["gruppo", "long", "passive"], choices=list(SETTINGS))
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--phases", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phases:
        time_phases(given.model, given.prompts)
        return
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(given.rounds):
        for busy in given.busy:
            for setting in given.settings:
                seconds = measured(setting, busy, given.model, given.prompts)
                found.setdefault((setting, busy), []).append(seconds)
                parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
                print(f"{setting}, {busy} busy: {sum(seconds.values()):.1f} s ({parts})", file=sys.stderr, flush=True)
    print("| setting | busy processes | seconds a step | against alone | against a fair share |")
    print("| --- | --- | --- | --- | --- |")
    for (setting, busy), steps in found.items():
        step = statistics.median(sum(seconds.values()) for seconds in steps)
        alone = [sum(seconds.values()) for seconds in found.get((setting, 0), [])]
        against = step / statistics.median(alone) if alone else float("nan")
        print(f"| {setting} | {busy} | {step:.1f} | {against:.2f} | {against * cores / (cores + busy):.2f} |")


if __name__ == "__main__":
    main()
