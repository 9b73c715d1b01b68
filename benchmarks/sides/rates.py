"""Measure matmul rates on this machine in GFLOP/s; they define the limit in the tables."""

from __future__ import annotations

import time

import torch
from protocol import Channel

# Rows, inputs, outputs: many tokens at once through the model's MLP, and one token of each of 64 completions.
SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (4096, 576, 1536), (64, 576, 1536), (64, 1536, 576))


def rate(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> float:
    """The best rate within half a second of matmuls."""
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
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            by_shape = {shape: rate(dtype, *shape) for shape in SHAPES}
            name = str(dtype).removeprefix("torch.")
            rates[name] = max(by_shape.values())
            rates[f"{name} (64 rows)"] = max(value for shape, value in by_shape.items() if shape[0] == 64)
        channel.reply(rates=rates)


if __name__ == "__main__":
    main()
