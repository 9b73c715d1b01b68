"""Where each second of a step of work A goes: phases by the clock, operators by torch's profiler.

`.venv/bin/python benchmarks/step_profile.py [--source CHECKOUT]`; the source is another checkout's code, so that one
revision can be set beside another. Lengths are work A's; every completion is sampled to 64 tokens.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROMPTS, GROUP, WIDTH, LONGEST, MEAN = 8, 8, 49, 64, 44.8

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "mkldnn"),
    "attention": ("attention", "flash"),
    "copies and casts": ("copy", "cat", "index", "gather", "scatter", "embedding", "stack", "clone", "to_copy"),
    "softmax, exponentials": ("softmax", "exp", "logsumexp", "cumsum", "searchsorted"),
    "optimizer": ("adam",),
}


def kind_of(name: str) -> str:
    """The kind of an operator, by its name."""
    return next(
        (kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other element by element"
    )


def phases(model: str) -> dict[str, Callable[[], Any]]:
    """A step's phases on work A's shapes, to be called in order."""
    from gruppo.algorithms.aggregation import sequence_mean_weights
    from gruppo.algorithms.losses import policy_loss
    from gruppo.engines.base import Request, SamplingParams
    from gruppo.engines.native.engine import NativeEngine
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.packing import MAX_TOKENS, pack, score
    from gruppo.types import Completion, Group, Prompt, Reward

    policy = load_model(find_model(model))
    reference = policy.frozen_copy()
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(100, 40000) for _ in range(WIDTH)) for _ in range(PROMPTS)]
    engine = NativeEngine(policy, PROMPTS * GROUP)
    options = SamplingParams(1.0, LONGEST, min_tokens=LONGEST)
    groups = []
    for place, prompt in enumerate(prompts):
        made = []
        for _ in range(GROUP):
            length = min(LONGEST, max(2, round(draw.gauss(MEAN, MEAN / 3))))
            ids = tuple(draw.randrange(100, 40000) for _ in range(length))
            made.append(Completion(ids, (-1.0,) * length, (True,) * length, "length", 0, ""))
        group = Group(Prompt(str(place), "", prompt, "t", {}), made, [Reward(0.0, {})] * GROUP)
        group.trained = [True] * GROUP
        group.advantages = [[(-1.0) ** number] * len(each.token_ids) for number, each in enumerate(made)]
        groups.append(group)
    batches = pack(groups, sequence_mean_weights, MAX_TOKENS, with_kl=True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-9, fused=True)

    def sample() -> None:
        requests = [Request(each, [(0, i, j) for j in range(GROUP)]) for i, each in enumerate(prompts)]
        engine.generate(requests, options)

    def refer() -> None:
        with torch.no_grad():
            for batch in batches:
                batch.ref_logprobs = score(reference, batch, 1.0)[0]

    def update() -> None:
        with policy.precision():
            for batch in batches:
                logprobs, _ = score(policy, batch, 1.0)
                old, weights = logprobs.detach(), batch.weights.float()
                loss = policy_loss(
                    logprobs, old, batch.advantages.float(), weights, 0.2, 0.2, batch.ref_logprobs, 0.04
                ).loss
                with torch.autocast("cpu", enabled=False):
                    loss.backward()

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        policy.generation.advance()
        optimizer.zero_grad(set_to_none=True)

    def load() -> None:
        engine.load_weights(policy.weight_source(), 1)

    return {
        "generation": sample, "reference": refer, "loss and backward": update, "optimizer": optimize,
        "weights to the engine": load,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1], help="the checkout to profile")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps; the best counts")
    given = parser.parse_args()
    sys.path.insert(0, str(given.source.resolve()))
    parts = phases(given.model)
    for run in parts.values():
        run()
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(given.repeats):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    spent: dict[str, dict[str, float]] = {name: {} for name in parts}
    for name, run in parts.items():
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            run()
        for event in watched.key_averages():
            kind = kind_of(event.key.lower())
            spent[name][kind] = spent[name].get(kind, 0.0) + event.self_cpu_time_total / 1e6
    kinds = [*KINDS, "other element by element"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds, the profiler's in parts\n")
    print("| phase | by the clock | " + " | ".join(kinds) + " |\n|" + " --- |" * (len(kinds) + 2))
    for name in parts:
        cells = " | ".join(f"{spent[name].get(kind, 0.0):.2f}" for kind in kinds)
        print(f"| {name} | {best[name]:.2f} | {cells} |")
    print(f"| a step | {sum(best.values()):.2f} |" + " |" * len(kinds))
    print(f"\npeak resident {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
