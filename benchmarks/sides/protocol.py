"""Code that all sides share: the JSON-lines protocol, the work file, timing of phases, and code for equal work.

It runs in every side's environment, so it imports nothing but torch, and that only where it is used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any


class Channel:
    """Reads commands from stdin and writes answers to the original stdout; everything printed later goes to stderr."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (command := self.read()) is not None:
            yield command

    def read(self) -> dict[str, Any] | None:
        """The next command, or None at the end of input."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def reply(self, **values: Any) -> None:
        """Send the answer to a command."""
        self.answers.write(json.dumps(values) + "\n")
        self.answers.flush()


def read_work() -> dict[str, Any]:
    """Read the work file, a side's first command-line argument."""
    work: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return work


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages."""
    return {name: metadata.version(name) for name in packages}


class Phases:
    """Times the phases of a step, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self, total: float) -> dict[str, float]:
        """Return the phases of a step that took `total` seconds, with the rest as "other", and start the next step."""
        taken, self.seconds = self.seconds, {}
        return {**taken, "other": total - sum(taken.values())}

    def watch_optimizer(self, optimizer: Any) -> None:
        """Time the optimizer's steps."""
        started: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: started.append(time.perf_counter()))
        optimizer.register_step_post_hook(lambda *_: self.add("optimizer", time.perf_counter() - started.pop()))


def fixed_rewards(completions: Sequence[Any], fixed: Sequence[Sequence[float]], **_: Any) -> list[float]:
    """The rewards from the work file; completions come group by group."""
    return [rewards[index % len(rewards)] for index, rewards in enumerate(fixed)]


def perturb(model: Any, seed: int) -> None:
    """Add noise of 3 % of a tensor's standard deviation to every weight, the same on every side."""
    import torch

    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator().manual_seed(seed + number)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.03 * parameter.std() * noise)


def gradient_norm(model: Any) -> float:
    """The norm over all gradients, summed in float64."""
    squares = [float(weight.grad.double().square().sum()) for weight in model.parameters() if weight.grad is not None]
    return float(sum(squares) ** 0.5)
