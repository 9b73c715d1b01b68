"""Profile a step of work A: phases by wall-clock time, operators by torch's profiler.

`.venv/bin/python benchmarks/step_profile.py [--source CHECKOUT]`; --source profiles the code of another checkout, to
compare two revisions. Lengths for scoring and training are work A's; every completion is sampled to 64 tokens.
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
    "matmuls": ("mm", "addmm", "bmm", "linear", "mkldnn"),
    "attention": ("attention", "flash"),
    "copies and casts": ("copy", "cat", "index", "gather", "scatter", "embedding", "stack", "clone", "to_copy"),
    "softmax, exponentials": ("softmax", "exp", "logsumexp", "cumsum", "searchsorted"),
    "optimizer": ("adam",),
}


def kind_of(name: str) -> str:
    """Kind of an operator, by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other elementwise")


def phases(model: str) -> dict[str, Callable[[], Any]]:
    """The phases of a step on work A's shapes; call them in order."""
    from gruppo.algorithms.aggregation import sequence_mean_weights
    from gruppo.algorithms.losses import policy_loss
    from gruppo.engines.base import Request, SamplingParams
    from gruppo.engines.native.engine import NativeEngine
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.packing import MAX_TOKENS, pack, score
    from gruppo.types import Completion, Group, Prompt, Reward

    policy = load_model(find_model(model))
    reference = policy.frozen_copy()
    source = random.Random(0)
    prompts = [tuple(source.randrange(100, 40000) for _ in range(WIDTH)) for _ in range(PROMPTS)]
    engine = NativeEngine(policy, PROMPTS * GROUP)
    options = SamplingParams(1.0, LONGEST, min_tokens=LONGEST)
    groups = []
    for place, prompt in enumerate(prompts):
        completions = []
        for _ in range(GROUP):
            length = min(LONGEST, max(2, round(source.gauss(MEAN, MEAN / 3))))
            ids = tuple(source.randrange(100, 40000) for _ in range(length))
            completions.append(Completion(ids, (-1.0,) * length, (True,) * length, "length", 0, ""))
        group = Group(Prompt(str(place), "", prompt, "t", {}), completions, [Reward(0.0, {})] * GROUP)
        group.trained = [True] * GROUP
        group.advantages = [
            [(-1.0) ** number] * len(completion.token_ids) for number, completion in enumerate(completions)
        ]
        groups.append(group)
    batches = pack(groups, sequence_mean_weights, MAX_TOKENS, with_kl=True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-9, fused=True)

    def sample() -> None:
        requests = [Request(prompt, [(0, i, j) for j in range(GROUP)]) for i, prompt in enumerate(prompts)]
        engine.generate(requests, options)

    def score_reference() -> None:
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
        "generation": sample, "reference": score_reference, "loss and backward": update, "optimizer": optimize,
        "weights to the engine": load,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1], help="checkout to profile")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps; the fastest counts")
    args = parser.parse_args()
    sys.path.insert(0, str(args.source.resolve()))
    parts = phases(args.model)
    for run in parts.values():
        run()
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(args.repeats):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    spent: dict[str, dict[str, float]] = {name: {} for name in parts}
    for name, run in parts.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        for event in profiler.key_averages():
            kind = kind_of(event.key.lower())
            spent[name][kind] = spent[name].get(kind, 0.0) + event.self_cpu_time_total / 1e6
    kinds = [*KINDS, "other elementwise"]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds (kinds of operators: by the profiler)\n"
    )
    print("| phase | wall clock | " + " | ".join(kinds) + " |\n|" + " --- |" * (len(kinds) + 2))
    for name in parts:
        cells = " | ".join(f"{spent[name].get(kind, 0.0):.2f}" for kind in kinds)
        print(f"| {name} | {best[name]:.2f} | {cells} |")
    print(f"| whole step | {sum(best.values()):.2f} |" + " |" * len(kinds))
    print(f"\npeak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
