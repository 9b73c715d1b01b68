"""A program for memory tests: it trains under a limit on its address space and prints the outcomes as JSON.

    python -m tests.limited FOLDER

The limit is the memory mapped once everything is loaded plus the rest of the recipe's budget. Under it, the run sized
by the budget must finish; a run with the largest micro-batch must fail, or finish if halving is allowed.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from gruppo.errors import RunError
from gruppo.models.footprint import LATER
from gruppo.models.weights import save_model
from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from gruppo.training.memory_estimate import choose_sizes
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.system import release_memory
from tests.conftest import make_policy
from tests.small_runs import ROWS, recipe

ROOM = 200_000_000  # bytes of the budget for the run itself: less than the activations of 1,024 tokens need
SMALLEST, LARGEST = 66, 1024  # tokens per micro-batch
SETTINGS = {
    "run__steps": 1, "run__checkpoint_every": 10, "sampling__prompts_per_step": 8, "sampling__group_size": 4,
    "sampling__max_tokens": 64, "method__kl_coef": 0.0,
}  # fmt: skip


def outcome(model: str, out: Path, memory: str) -> dict[str, Any]:
    try:
        train(recipe(model, run__memory=memory, **SETTINGS), prompts=ROWS, out=out, progress=False)
        error = None
    except RunError as raised:
        error = str(raised)
    gc.collect()  # an error's frames keep the failed tensors alive
    release_memory()
    chosen = json.loads((out / "environment.json").read_text())["chosen"]
    lines = read_lines(out / "metrics.jsonl")
    return {
        "error": error,
        "chosen": chosen["micro_batch_tokens"],
        "steps": len(lines),
        "last": lines[-1]["memory/micro_batch_tokens"] if lines else None,
        "halvings": [e["after"] for e in read_lines(out / "events.jsonl") if e["kind"] == "memory"],
    }


def sized(tokens: int) -> Callable[..., Any]:
    """Patch `choose_sizes` to use micro-batches of `tokens` tokens, regardless of the available memory."""

    def choose(*args: Any) -> Any:
        return replace(choose_sizes(*args), micro_batch_tokens=tokens)

    return mock.patch("gruppo.training.sizing.choose_sizes", choose)


def in_a_fork(model: str, out: Path, *patches: Any) -> dict[str, Any]:
    """`outcome` in a forked process, so that no run reuses heap memory of another."""
    child = os.fork()
    if not child:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            out.with_suffix(".json").write_text(json.dumps(outcome(model, out, "100 GB")))
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(out.with_suffix(".json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    folder = Path(sys.argv[1])
    model = str(folder / "wide")
    save_model(make_policy(initializer_range=0.02, hidden_size=64, intermediate_size=16384), Path(model))
    with sized(SMALLEST):
        outcome(model, folder / "warm", "100 GB")  # libraries are loaded on first use
    process = psutil.Process().memory_info()
    budget = process.rss + LATER + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (process.vms + budget - process.rss, resource.RLIM_INFINITY))
    without_halving = mock.patch.object(
        BatchSizes, "run_with_retry", lambda self, size, _, attempt: attempt(getattr(self, size))
    )
    outcomes = {
        "largest": in_a_fork(model, folder / "largest", sized(LARGEST), without_halving),
        "halved": in_a_fork(model, folder / "halved", sized(LARGEST)),
        "budget": outcome(model, folder / "budget", f"{budget // 1000} KB"),
    }
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
