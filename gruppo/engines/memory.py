"""The memory that sampling takes, and the number of slots that a budget holds.

Nothing here changes a completion, except by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.config.units import bytes_of
from gruppo.engines import build_engine
from gruppo.engines.base import Engine, SamplingParams
from gruppo.engines.native.engine import MAX_SLOTS, PREFILL_TOKENS
from gruppo.engines.native.kv_cache import PAGE_TOKENS, room
from gruppo.errors import UsageError
from gruppo.models.footprint import Footprint, measure_footprint, process_bytes
from gruppo.models.policy import LanguageModel
from gruppo.utils.progress import Progress
from gruppo.utils.system import free_memory

FRAGMENTS = 1.05  # resident over allocated bytes of the temporaries of a step; see benchmarks/memory.py
# The same where transformers' modules compute, as with adapters: they free many small temporaries between tensors that
# are kept for backward.
MODULE_FRAGMENTS = 1.4
# The same on an accelerator, a margin and no measurement: torch's allocator rounds blocks up to 2 MiB, and keeps blocks
# of micro-batches of other shapes, which it reuses only in part.
DEVICE_FRAGMENTS = 1.1
# Of a token of an answer, as Python objects: 68 of the completion, 45 of the row, the rest while the table is written.
ANSWER_TOKEN_BYTES = 150


@dataclass(frozen=True)
class Free:
    """The memory budget of a recipe and the memory that the process uses, in bytes, before the weights are loaded.

    `settable`: the user can raise the budget, with `run.memory`.
    """

    budget: int
    process: int
    settable: bool = True

    @classmethod
    def now(cls, memory: float | str, device: torch.device, settable: bool = True) -> Free:
        """The current state of the machine. `memory`: the recipe's `run.memory`, for the whole process."""
        used = process_bytes(device)
        return cls(bytes_of(memory, free_memory(device) + used), used, settable)


Decoding = Literal["full", "greedy", "truncated"]


def decoding_of(params: SamplingParams) -> Decoding:
    """Whether tokens are sampled from the full distribution or a truncated one, or the most likely one is taken."""
    if not params.temperature:
        return "greedy"
    return "full" if params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0 else "truncated"


@dataclass(frozen=True)
class Sampled:
    """Upper bounds of what an engine samples in one call; lengths in tokens.

    `decoding`: how tokens are chosen, see `decoding_of`. `field`: the recipe field of `max_tokens`. `turns`: there are
    several, so the engine keeps keys and values between its calls, or every completion is a prompt of its own, which
    ends with all that was written before.
    """

    completions: int
    prompts: int
    prompt_tokens: int
    max_tokens: int
    decoding: Decoding = "full"
    field: str = "sampling.max_tokens"
    turns: bool = False

    @property
    def answers_bytes(self) -> int:
        """Bytes of the completions as Python objects and as the rows of a table."""
        return self.completions * self.max_tokens * ANSWER_TOKEN_BYTES

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prompt with its completion, and with what was written before."""
        return self.prompt_tokens + (2 if self.turns else 1) * self.max_tokens


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of each part at the peak of sampling, if nothing is trained.

    `others`: models beside the one that samples. `work`: temporaries of prefill and of sampling. `answers`: what the
    answers take that are sampled and graded together.
    """

    process: int
    weights: int
    prepared: int
    others: int
    cache: int
    work: int
    answers: int

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, int]:
        """The peak, and the parts."""
        return {"peak": self.peak, **self.parts}


def fragments(footprint: Footprint) -> float:
    """Resident over allocated bytes of temporaries."""
    if footprint.accelerator:
        return DEVICE_FRAGMENTS
    return FRAGMENTS if footprint.fused else MODULE_FRAGMENTS


def logit_bytes(footprint: Footprint, decoding: Decoding) -> int:
    """Temporaries of `sample_tokens` at their peak, in bytes per logit of a row.

    gruppo's kernel reads the logits as they are. Otherwise they are widened, and: the most likely token needs their
    exponentials; the full distribution its probabilities, divided by the temperature and padded to whole blocks; top-p
    the sorted logits with their places, and the running sums of their probabilities in float64.
    """
    narrow, wide = footprint.narrow, footprint.wide
    if decoding == "full":
        return narrow if footprint.kernels else narrow + 4 * wide
    return narrow + 2 * wide if decoding == "greedy" else narrow + 3 * wide + 3 * 8 + 2


def sampling_bytes(footprint: Footprint, slots: int, work: Sampled) -> tuple[int, int]:
    """Bytes of the key-value caches, and of the engine's temporaries in prefill or in a decoding step.

    Prefill holds one layer's activations for each prompt token; shorter prompts fill its passes. A decoding step holds
    the temporaries of each row's logits; without gruppo's kernels, attention also copies one layer's cache. Both have
    the output head in the layout of the matmuls.

    Between turns, as many completions are kept as there are slots, with their prompts. Or each of them, with all of its
    turns, is a prompt of its own.
    """
    rows, places = min(slots, work.completions), min(slots, work.prompts)
    page_tokens = PAGE_TOKENS if footprint.accelerator else None
    prompt_tokens = work.prompt_tokens
    tokens = rows * room(work.max_tokens, page_tokens) + places * room(prompt_tokens, page_tokens)
    if work.turns:
        places, prompt_tokens = rows, prompt_tokens + work.max_tokens
        tokens = max(2 * tokens, rows * room(work.max_tokens, page_tokens) + places * room(prompt_tokens, page_tokens))
    cache = int(footprint.cache_token * tokens * (DEVICE_FRAGMENTS if footprint.accelerator else 1))
    together = min(places, max(1, PREFILL_TOKENS // prompt_tokens))
    filled = max(1.0, min(PREFILL_TOKENS, places * prompt_tokens) / (together * prompt_tokens))
    prefill = filled * footprint.activations([(prompt_tokens, ())] * together, recompute=False) / footprint.layers
    logits = logit_bytes(footprint, work.decoding) * (footprint.logits_token // footprint.wide) * rows
    decoding = logits + (0 if footprint.kernels else cache // footprint.layers)
    return cache, footprint.packed_head + int(fragments(footprint) * max(prefill, decoding))


def forecast_sampling(
    footprint: Footprint, works: Sequence[Sampled], slots: int, others: int = 0, elsewhere: bool = False
) -> SamplingMemory:
    """Estimate the memory of sampling `works` one after the other, if everything has the maximum length.

    `others`: bytes of models beside this one. `elsewhere`: the engine has a process and memory of its own.
    """

    def of(work: Sampled) -> tuple[int, int, int]:
        return *((0, 0) if elsewhere else sampling_bytes(footprint, slots, work)), work.answers_bytes

    cache, temporaries, answers = max(map(of, works), key=sum)
    return SamplingMemory(footprint.process, footprint.weights, footprint.prepared, others, cache, temporaries, answers)


def open_engine_within(
    free: Free,
    policy: LanguageModel,
    settings: EngineTable,
    works: Sequence[Sampled],
    stack: ExitStack,
    progress: Progress,
    others: int = 0,
) -> tuple[Engine, SamplingMemory]:
    """Build an engine with the largest useful number of slots whose estimated memory is within the budget.

    `works`: what it is to sample, one after the other; `others`: see `forecast_sampling`. `stack` closes the engine.
    Raises UsageError if not even one slot fits.
    """
    footprint, elsewhere = measure_footprint(policy, free.process, progress, trains=False), settings.has_own_process
    forecast = partial(forecast_sampling, footprint, works, others=others, elsewhere=elsewhere)
    wanted = max(1, min(MAX_SLOTS, max(work.completions for work in works)))
    slots = largest(1, wanted, lambda count: forecast(slots=count).peak <= free.budget)
    if not slots:
        raise _too_little(forecast(slots=1), works, free)
    longest = max(work.longest for work in works)
    engine = build_engine(policy, slots, settings=settings, length=longest)
    stack.callback(engine.close)
    return engine, forecast(slots=slots)


def _too_little(least: SamplingMemory, works: Sequence[Sampled], free: Free) -> UsageError:
    part, size = max(least.parts.items(), key=lambda item: item[1])
    work = max(works, key=lambda work: work.longest)
    allows, more = "memory: there is room for", "stop other programs"
    if free.settable:
        allows = "run.memory: allows"
        more = f'raise it (a larger share, or e.g. "{least.peak / 1e9 + 0.1:.1f} GB")'
    return UsageError(
        f"{allows} {free.budget / 1e9:.2f} GB, but sampling needs at least {least.peak / 1e9:.2f} GB, most of it for "
        f"{part} ({size / 1e9:.2f} GB), with one completion of {work.prompt_tokens} + {work.max_tokens} tokens at a "
        f"time; {more}, or use a smaller {work.field} or model"
    )


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits, 0 if none does.

    Everything below a number that fits must also fit, except below `high`.
    """
    if fits(high):
        return high
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
