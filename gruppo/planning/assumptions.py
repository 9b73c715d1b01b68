"""The numbers that a plan assumes, each with its meaning and its source. `gruppo plan` has an option for each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from gruppo.errors import UsageError


def _number(default: float | None, unit: str, meaning: str, source: str, most: float = 1e12) -> Any:
    metadata = {"unit": unit, "meaning": meaning, "source": source, "most": most}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Assumptions:
    """What cannot be read from the recipe, the model's config or a data sheet. One set serves every model and device.

    Raises UsageError for a number that is not positive, or a share above 1.
    """

    mfu: float = _number(
        0.35, "share",
        "share of the peak floating-point rate that dense models reach in training and scoring",
        "prime-rl's trainer benchmarks: 0.14 to 0.35 (Qwen3-4B, 8xH100)", 1,
    )  # fmt: skip
    moe_mfu: float = _number(
        0.1, "share", "the same share for a mixture of experts, counting only the weights that a token uses",
        "prime-rl's trainer benchmark: 0.03 (Qwen3-30B-A3B, 8xH100); our choice is higher", 1,
    )  # fmt: skip
    bandwidth_share: float = _number(
        0.7, "share", "share of the peak bandwidth of memory and links that is reached",
        "open-instruct PR 957: 0.52 in all of sampling; our choice for the kernels alone", 1,
    )  # fmt: skip
    iteration_ms: float = _number(
        2.0, "ms", "time of an engine per token besides computing: scheduling, launching kernels, sampling",
        "our choice",
    )  # fmt: skip
    reduce_us: float = _number(
        20.0, "µs", "latency of one of the two sums per layer of an engine on several devices", "our choice"
    )
    engine_memory: float = _number(
        0.9,
        "share",
        "share of the memory of a device that an engine may use",
        "vLLM's default gpu_memory_utilization",
        1,
    )
    slots: float | None = _number(
        None, "completions", "maximum number of concurrent completions of an engine",
        "vLLM's default max_num_seqs: 256 on devices under 70 GiB and on A100, else 1024",
    )  # fmt: skip
    mean_share: float = _number(
        0.5, "share", "mean completion length as a share of sampling.max_tokens",
        "NeMo RL's benchmarks: 0.25 to 0.79", 1,
    )  # fmt: skip
    mean_tokens: float | None = _number(None, "tokens", "mean completion length", "mean_share × sampling.max_tokens")
    prompt_tokens: float = _number(
        128, "tokens", "mean prompt length", "NeMo RL's benchmarks: 104 to 127 (OpenMathInstruct-2)"
    )
    spread: float = _number(
        0.7, "nats", "standard deviation of the logarithm of the completion length, before it is limited", "our choice"
    )
    longest_share: float = _number(
        1.0, "share", "longest completion of a step as a share of sampling.max_tokens",
        "our choice: among thousands of completions, one is truncated", 1,
    )  # fmt: skip
    micro_batch_tokens: float = _number(
        16384, "tokens", "tokens of a micro-batch on one device, at least one completion of maximum length",
        "our choice",
    )  # fmt: skip
    transfer_gb_s: float = _number(
        8.0, "GB/s", "rate at which new weights reach the engines",
        "verl's documentation: 4 to 20 (Qwen3-30B-A3B, Qwen3-235B-A22B)",
    )  # fmt: skip
    network_gb_s: float = _number(
        50.0, "GB/s", "network bandwidth of a device, one way, if there are several machines",
        "one adapter of 400 Gb/s per device, as in DGX H100",
    )  # fmt: skip
    other_share: float = _number(
        0.05, "share", "time for rewards, packing and moving data, as a share of the time of everything else",
        "verl's documentation: 0.03 to 0.07 (Qwen2.5-Math-7B, 32 to 128 H20)", 1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for each in fields(self):
            value, most = getattr(self, each.name), each.metadata["most"]
            if value is not None and not 0 < value <= most:
                limit = f"more than 0 and at most {most:g}"
                raise UsageError(
                    f"--{each.name.replace('_', '-')} {value:g}: must be {limit} ({each.metadata['meaning']})"
                )

    def named(self) -> dict[str, dict[str, Any]]:
        """Value, unit, meaning and source of each number, by name."""
        return {
            each.name: {
                "value": getattr(self, each.name),
                **{k: each.metadata[k] for k in ("unit", "meaning", "source")},
            }
            for each in fields(self)
        }

    def mfu_of(self, experts: int) -> float:
        """The share of the peak rate for a model with this number of experts."""
        return self.moe_mfu if experts else self.mfu
