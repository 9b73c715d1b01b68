"""Estimates a run's peak memory, and chooses the sizes that keep it within the recipe's budget.

The tensors that a model keeps for backward are measured on the model itself, in a trial of a few dozen tokens. The rest
is counted, with one documented function per part. Nothing here changes a result: results do not depend on
micro-batches, slots or recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gruppo.config.units import bytes_of
from gruppo.engines.native.engine import MAX_SLOTS, PREFILL_TOKENS
from gruppo.engines.native.kv_cache import PAGE_TOKENS, room
from gruppo.errors import UsageError
from gruppo.models.logprobs import logit_block
from gruppo.models.packing import most_tokens
from gruppo.training.memory_footprint import Footprint, Layout, layout_tokens, process_bytes
from gruppo.utils.system import free_memory

FRAGMENTS = 1.05  # resident over allocated bytes of the temporaries of a step; see benchmarks/memory.py
# The same where transformers' modules compute, as with adapters: they free many small temporaries between tensors that
# are kept for backward.
MODULE_FRAGMENTS = 1.4
# The same on an accelerator, a margin and no measurement: torch's allocator rounds blocks up to 2 MiB, and keeps blocks
# of micro-batches of other shapes, which it reuses only in part.
DEVICE_FRAGMENTS = 1.1

PHASES = ("sampling", "training", "evaluation")


@dataclass(frozen=True)
class EvalWorkload:
    """Upper bounds of one evaluation set; lengths in tokens. `times`: how often a run evaluates it."""

    name: str
    questions: int
    samples: int
    question_tokens: int
    answer_tokens: int
    times: int

    @property
    def answers(self) -> int:
        """Answers per evaluation."""
        return self.questions * self.samples


@dataclass(frozen=True)
class Workload:
    """Upper bounds of a run's work; lengths in tokens.

    `reference`: there is a copy of the policy, which adapters do not need. `turns`: completions are sampled in several
    turns, so the engine keeps keys and values between its calls, or every completion is a prompt of its own.
    `samples_elsewhere`: the engine has a process and memory of its own. `lag`: steps that sampling may be ahead of
    training; if not 0, both take memory at the same time. `engines`: there are several engines elsewhere, which get
    their weights from a copy. `shards`: of the weights, one for each of several ranks; 0 in a single process.
    """

    prompt_tokens: int
    max_tokens: int
    prompts_per_step: int
    group_size: int
    reference: bool = False
    critic: bool = False
    reward_model: bool = False
    eval_sets: tuple[EvalWorkload, ...] = ()
    turns: bool = False
    samples_elsewhere: bool = False
    lag: int = 0
    engines: bool = False
    shards: int = 0

    @property
    def answers(self) -> int:
        """Answers of the largest evaluation set."""
        return max((eval_set.answers for eval_set in self.eval_sets), default=0)

    @property
    def completions(self) -> int:
        """Completions per step."""
        return self.prompts_per_step * self.group_size

    def micro_batches(self, budget: int) -> list[list[tuple[int, list[int]]]]:
        """The layouts that `pack` makes of a step whose prompts and completions all have the maximum length."""
        completion, tokens = self.max_tokens - 1, 0
        layouts: list[list[tuple[int, list[int]]]] = []
        for number in range(self.completions):
            continues = bool(layouts) and number % self.group_size > 0
            needed = completion if continues else completion + self.prompt_tokens
            if not layouts or tokens + needed > budget:
                layouts.append([(self.prompt_tokens, [])])
                tokens, needed = 0, completion + self.prompt_tokens
            elif not continues:
                layouts[-1].append((self.prompt_tokens, []))
            layouts[-1][-1][1].append(completion)
            tokens += needed
        return layouts

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the engine samples: a prompt with its completion."""
        sets = [(part.question_tokens, part.answer_tokens) for part in self.eval_sets]
        lengths = [(self.prompt_tokens, self.max_tokens), *sets]
        return max(prompt + (2 if self.turns else 1) * completion for prompt, completion in lengths)

    @property
    def smallest(self) -> int:
        """Tokens of the smallest micro-batch: one completion with its prompt."""
        return self.prompt_tokens + self.max_tokens - 1


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the peak of its phase; see `parts` for what is alive when.

    `work` and `evaluation_work`: temporaries of prefill and sampling. `logits`: temporaries of log-probabilities,
    forward and backward. `backward`: temporaries of a layer's backward pass, 0 on a CPU, where micro-batches are small.
    `gradients`: gradients that exist in addition to all activations. `versions`: copies of the weights that are sampled
    from, or will be, while the policy is trained; `lags`: whether there is sampling meanwhile. `gathered`: weights of
    other ranks that a rank has for a moment.

    Of several ranks, this is the leader, which needs most: it alone samples, from a copy of the weights.
    """

    process: int
    weights: int
    optimizer: int
    reference: int
    critic: int
    reward_model: int
    prepared: int
    cache: int
    work: int
    evaluation_cache: int
    evaluation_work: int
    gradients: int
    activations: int
    logits: int
    backward: int
    versions: int = 0
    lags: bool = False
    gathered: int = 0

    def parts(self, phase: str) -> dict[str, int]:
        """Bytes alive in a phase, by name."""
        always = ("process", "weights", "optimizer", "reference", "critic", "reward_model", "prepared")
        of_phase = {
            "sampling": {"cache": self.cache, "work": self.work},
            "evaluation": {"cache": self.evaluation_cache, "work": self.evaluation_work},
            "training": {
                "gradients": self.gradients,
                "activations": self.activations,
                "logits": self.logits,
                "backward": self.backward,
                **({"cache": self.cache, "work": self.work} if self.lags else {}),
            },
        }[phase]
        some = {name: getattr(self, name) for name in ("versions", "gathered") if getattr(self, name)}
        return {name: getattr(self, name) for name in always} | some | of_phase

    @property
    def sampling(self) -> int:
        """The peak during sampling."""
        return sum(self.parts("sampling").values())

    @property
    def training(self) -> int:
        """The peak while gradients are computed."""
        return sum(self.parts("training").values())

    @property
    def evaluation(self) -> int:
        """The peak during evaluation; without evaluation sets, what is always alive."""
        return sum(self.parts("evaluation").values())

    @property
    def peak(self) -> int:
        """The largest peak of all phases."""
        return max(self.sampling, self.training, self.evaluation)

    def as_dict(self) -> dict[str, Any]:
        """The peak, and the parts of each phase."""
        return {"peak": self.peak, **{phase: self.parts(phase) for phase in PHASES}}


@dataclass(frozen=True)
class ChosenSizes:
    """Sizes within a budget, and the memory they need. `recompute`: recompute activations in backward."""

    micro_batch_tokens: int
    slots: int
    recompute: bool
    budget_bytes: int
    memory: Memory


def budget_bytes(memory: float | str, device: torch.device) -> int:
    """The recipe's `run.memory` in bytes, for the whole process. Call it before the weights are loaded."""
    return bytes_of(memory, free_memory(device) + process_bytes(device))


def forecast_memory(
    footprint: Footprint, workload: Workload, micro_batch_tokens: int, slots: int, recompute: bool = False
) -> Memory:
    """Estimate the memory of a run with these sizes, if every prompt and completion has the maximum length.

    Of several ranks, each has a shard of weights, moments and gradients, and gathers what it computes with; this is the
    leader. If a step has several micro-batches, they are assumed to be full: shorter completions fill the gaps of
    longer ones.
    """
    layouts = workload.micro_batches(micro_batch_tokens)
    layout = max(layouts, key=lambda candidate: footprint.activations(candidate, recompute))
    activations = footprint.activations(layout, recompute)
    if len(layouts) > 1:
        activations = int(activations * max(1.0, micro_batch_tokens / layout_tokens(layout)))
    logits = _logits(footprint, layout)
    # A layer's backward pass has about one temporary for each tensor that its forward pass kept.
    backward = footprint.activations(layout, False) // footprint.layers if footprint.accelerator else 0
    resident = partial(_resident, _fragments(footprint))
    shards = workload.shards or 1
    gradients = footprint.gradients // shards
    if len(layouts) == 1:  # gradients are allocated while activations are freed
        gradients = max(0, gradients - activations - logits)
    step = workload.completions, workload.prompts_per_step, workload.prompt_tokens, workload.max_tokens
    cache, work = _generation(footprint, slots, workload.turns, *step)
    if workload.samples_elsewhere:
        cache = work = 0
    evaluations = [
        _generation(
            footprint,
            slots,
            workload.turns,
            eval_set.answers,
            eval_set.questions,
            eval_set.question_tokens,
            eval_set.answer_tokens,
        )
        for eval_set in (() if workload.samples_elsewhere else workload.eval_sets)
    ]
    evaluation_cache, evaluation_work = max(evaluations, key=sum, default=(0, 0))
    return Memory(
        process=footprint.process,
        weights=footprint.weights // shards,
        optimizer=footprint.moments // shards,
        reference=footprint.reference // shards if workload.reference else 0,
        critic=footprint.critic // shards if workload.critic else 0,
        reward_model=footprint.critic // shards if workload.reward_model else 0,
        prepared=0 if workload.shards else resident(footprint.prepared),
        cache=resident(cache),
        work=resident(work),
        evaluation_cache=resident(evaluation_cache),
        evaluation_work=resident(evaluation_work),
        gradients=resident(gradients),
        activations=resident(activations),
        logits=resident(logits),
        backward=resident(backward),
        versions=_versions(footprint, workload),
        lags=workload.lag > 0,
        gathered=footprint.gathered if workload.shards else 0,
    )


def _versions(footprint: Footprint, workload: Workload) -> int:
    """Bytes of the copies of a run that samples ahead: that of the engine, with its prepared weights, unless it has a
    process of its own, or that of several engines; and one for each further step of the lag. The leader of several
    ranks has one in any case."""
    if not workload.lag and not workload.shards:
        return 0
    prepared = 0 if workload.samples_elsewhere or workload.engines else footprint.prepared
    copies = workload.lag - (workload.samples_elsewhere and not workload.engines)
    return max(copies, int(workload.shards > 0)) * footprint.reference + prepared


def _fragments(footprint: Footprint) -> float:
    if footprint.accelerator:
        return DEVICE_FRAGMENTS
    return FRAGMENTS if footprint.fused else MODULE_FRAGMENTS


def _resident(fragments: float, allocated: int) -> int:
    return int(fragments * allocated)


def _logits(footprint: Footprint, layout: Layout) -> int:
    """The peak of `token_logprobs`: a chunk's logits for a part of the vocabulary, three times, and on an accelerator
    their part of the weight's gradient, which is the whole weight.

    A head without a gradient also needs that gradient, which `Footprint.gradients` already counts.
    """
    vocabulary = footprint.logits_token // footprint.wide
    most, entries = logit_block(vocabulary, footprint.wide, footprint.accelerator)
    chunk, part = (
        min(most, sum(length + 1 for _, completions in layout for length in completions)),
        min(entries, vocabulary),
    )
    return 3 * chunk * part * footprint.wide + (part * footprint.state_token if footprint.accelerator else 0)


def _generation(
    footprint: Footprint,
    slots: int,
    turns: bool,
    completions: int,
    prompts: int,
    prompt_tokens: int,
    max_tokens: int,
) -> tuple[int, int]:
    """Bytes of the key-value caches, and of the engine's temporaries in prefill or in a decoding step.

    Prefill holds the prompts' keys and values a second time, and one layer's activations for each token. A decoding
    step holds the logits of each row three times, and one layer's cache a second time.

    Between `turns`, as many completions are kept as there are slots, with their prompts. Or each of them, with all of
    its turns, is a prompt of its own.
    """
    rows, places = min(slots, completions), min(slots, prompts)
    page_tokens = PAGE_TOKENS if footprint.accelerator else None
    tokens = rows * room(max_tokens, page_tokens) + places * room(prompt_tokens, page_tokens)
    if turns:
        places, prompt_tokens = rows, prompt_tokens + max_tokens
        tokens = max(2 * tokens, rows * room(max_tokens, page_tokens) + places * room(prompt_tokens, page_tokens))
    cache = footprint.cache_token * tokens
    together = min(places, max(1, PREFILL_TOKENS // prompt_tokens))
    layer = footprint.activations([(prompt_tokens, ())] * together, recompute=False) // footprint.layers
    prefill = footprint.cache_token * together * prompt_tokens + layer
    decoding = 3 * footprint.logits_token * rows + cache // footprint.layers
    return cache, max(prefill, decoding)


def choose_sizes(footprint: Footprint, workload: Workload, budget: int) -> ChosenSizes:
    """The largest sizes whose estimated memory is within the budget.

    Activations are recomputed only if otherwise not even one completion could be trained on. If a run samples while it
    trains, sampling gets at most half of what neither needs at least. Raises UsageError if nothing fits.
    """
    if workload.shards:
        _check_start(footprint, workload, budget)

    def memory(tokens: int, slots: int, recompute: bool) -> Memory:
        return forecast_memory(footprint, workload, tokens, slots, recompute)

    def fits(recompute: bool, tokens: int) -> bool:
        return memory(tokens, slots if workload.lag else 1, recompute).training <= budget

    highest = most_tokens(workload.prompt_tokens, footprint.accelerator)
    least = min(workload.smallest, highest)
    share = (budget + memory(least, 1, True).training) // 2  # for the slots, beside training

    def holds(count: int) -> bool:
        need = memory(least, count, True)
        together = not workload.lag or need.training <= min(budget, share)
        return together and max(memory(1, count, True).sampling, need.evaluation) <= budget

    most = max(1, min(MAX_SLOTS, max(workload.completions, workload.answers)))
    slots = _largest(1, most, holds)
    for recompute in (False, True):
        tokens = _largest(least, highest, partial(fits, recompute))
        if slots and tokens:
            return ChosenSizes(tokens, slots, recompute, budget, memory(tokens, slots, recompute))
    raise _too_little(memory(least, 1, True), workload, budget)


def _check_start(footprint: Footprint, workload: Workload, budget: int) -> None:
    """Raise UsageError if the leader of several ranks cannot hold the models before they are dealt out."""
    copies = 2 if workload.reference else 1
    needed = footprint.process + footprint.weights + copies * footprint.reference
    if needed > budget:
        reference = ", the reference" if workload.reference else ""
        raise UsageError(
            f"run.memory: allows {_gigabytes(budget)}, but rank 0 has the whole model{reference} and the copy that it "
            f"samples from, before it deals out shards, which takes {_gigabytes(needed)}; raise it (a larger share, or "
            f'e.g. "{needed / 1e9 + 0.1:.1f} GB"), or use a smaller model'
        )


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits, 0 if none does.

    Everything below a number that fits also fits, except below `high`: a step in one micro-batch has no gradients in
    addition to its activations.
    """
    if fits(high):
        return high
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _too_little(least: Memory, workload: Workload, budget: int) -> UsageError:
    phase = max(PHASES, key=lambda name: getattr(least, name))
    part, size = max(least.parts(phase).items(), key=lambda item: item[1])
    return UsageError(
        f"run.memory: allows {_gigabytes(budget)}, but {phase} needs at least {_gigabytes(least.peak)}, most of it for "
        f"{part} ({_gigabytes(size)}), with one completion of {workload.prompt_tokens} + {workload.max_tokens} tokens "
        f'at a time; raise it (a larger share, or e.g. "{least.peak / 1e9 + 0.1:.1f} GB"), or use a smaller '
        "sampling.max_tokens, a smaller task.max_prompt_tokens, a smaller model, or method.kl_coef = 0"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
