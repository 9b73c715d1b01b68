"""Where the time of one GRPO step goes: `make bench`, or `.venv/bin/python benchmarks/step.py --help`.

Rates of matrix products are measured in the same run; "share" is the step's floating-point work (2·N a token sampled,
6·N a token trained on, each prompt once) over that rate and the time taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from gruppo.engines import Request, SamplingOptions
from gruppo.engines.native import NativeEngine
from gruppo.maths.losses import policy_loss, sequence_mean_weights
from gruppo.models import find_model, load_model
from gruppo.packing import MAX_TOKENS, pack, score
from gruppo.tasks import load_rows, tokenize_rows
from gruppo.types import Group


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of some repetitions, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of [512, 576] · [576, 1536] products."""
    left, right = torch.randn(512, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    return 2 * 512 * 576 * 1536 / seconds(lambda: left @ right, 20) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    source = find_model(given.model)
    policy = load_model(source, dtype=given.dtype)
    rows = load_rows("arithmetic", "train", {})[: given.prompts]
    prompts = tokenize_rows(rows, source.tokenizer, source.context, given.max_tokens, "arithmetic")
    engine = NativeEngine(policy, given.prompts * given.group_size)
    streams = [[(0, place, index) for index in range(given.group_size)] for place in range(given.prompts)]
    requests = [Request(prompt.token_ids, keys) for prompt, keys in zip(prompts, streams, strict=True)]
    options = SamplingOptions(1.0, given.max_tokens)
    made = engine.generate(requests, options)
    sampling = seconds(lambda: engine.generate(requests, options), 2)
    groups = []
    for prompt, completions in zip(prompts, made, strict=True):
        group = Group(prompt, completions, [])
        group.trained = [True] * len(completions)
        group.advantages = [[(-1.0) ** index] * len(c.token_ids) for index, c in enumerate(completions)]
        groups.append(group)
    batches = pack(groups, sequence_mean_weights, MAX_TOKENS, with_kl=False)

    def update() -> None:
        policy.model.zero_grad(set_to_none=True)
        with policy.precision():
            for batch in batches:
                logprobs, _ = score(policy, batch, 1.0)
                loss = policy_loss(
                    logprobs, logprobs.detach(), batch.advantages.float(), batch.weights.float(), 0.2, 0.2
                ).loss
                with torch.autocast("cpu", enabled=False):
                    loss.backward()

    updating = seconds(update, 2)
    rate = product_rate(policy.dtype)
    sampled = sum(len(completion.token_ids) for group in made for completion in group)
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    print(f"{policy.dtype}, products {rate:.0f} GFLOP/s, {size / 1e6:.1f} M parameters")
    for name, spent, flop in (
        ("sampling", sampling, 2 * size * (sampled + prompt_tokens)),
        ("update", updating, 6 * size * (sampled + prompt_tokens)),
    ):
        share = flop / (rate * 1e9) / spent
        print(f"{name:<9} {spent:6.2f} s  {sampled / spent:6.0f} completion tokens/s  share of the limit {share:.0%}")


if __name__ == "__main__":
    main()
