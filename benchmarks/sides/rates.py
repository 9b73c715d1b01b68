"""Rates of matrix products on this machine, GFLOP/s: the limit that shares are shares of."""

from __future__ import annotations

import time

import torch
from protocol import Channel

# Rows, inputs and outputs: many tokens at once through the model's MLP, and one token of 64 completions.
SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (4096, 576, 1536), (64, 576, 1536), (64, 1536, 576))


def rate(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> float:
    """The best of half a second of products."""
    left, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(left, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inputs * outputs / best / 1e9


def main() -> None:
    channel = Channel()
    channel.reply(versions={})
    for _ in channel:
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            made = {shape: rate(dtype, *shape) for shape in SHAPES}
            name = str(dtype).removeprefix("torch.")
            found[name] = max(made.values())
            found[f"{name} of 64 rows"] = max(value for shape, value in made.items() if shape[0] == 64)
        channel.reply(rates=found)


if __name__ == "__main__":
    main()
