"""How much memory a run will need at its peak, and the sizes that keep it within the recipe's budget.

What a model keeps for backward is measured on the model itself, in a trial of a few dozen tokens; the rest is counted,
a documented function for each part. Nothing here changes a result: micro-batches, slots and recomputation cannot be
seen in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from gruppo.config.units import as_bytes
from gruppo.engines.native.engine import MAX_SLOTS, PREFILL_TOKENS
from gruppo.errors import UsageError
from gruppo.models.logprobs import CHUNK_SIZE, PART_SIZE
from gruppo.models.packing import Batch, most_tokens, score
from gruppo.models.policy import LanguageModel
from gruppo.utils.progress import Progress
from gruppo.utils.system import free_memory, release_memory

LATER = 95_000_000  # what libraries take when they are first used: kernels, the writer of tables; measured on Linux
FRAGMENTS = 1.05  # resident over allocated bytes of what comes and goes in a step; see benchmarks/memory.py
PHASES = ("sampling", "training", "evaluation")

# (prompt, completions, tokens of each that are read): as many as `_terms` has and one, and telling all of them apart. A
# single completion would be kept in other shapes than several are.
_TRIALS = ((8, 2, 4), (24, 2, 4), (8, 4, 4), (8, 2, 12), (8, 4, 12), (24, 4, 4), (12, 2, 16), (40, 2, 4))

# A group as it is read: tokens of its prompt, and of each completion.
Layout = Sequence[tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class EvalWorkload:
    """What an exam asks for, at the most; lengths in tokens. `times`: how often a run holds it."""

    name: str
    questions: int
    samples: int
    question_tokens: int
    answer_tokens: int
    times: int

    @property
    def answers(self) -> int:
        """Answers each time."""
        return self.questions * self.samples


@dataclass(frozen=True)
class Workload:
    """What a run asks for, at the most; lengths in tokens. `turns`: completions are written in several, and each is a
    prompt of its own then."""

    prompt_tokens: int
    max_tokens: int
    prompts_per_step: int
    group_size: int
    reference: bool = False
    critic: bool = False
    reward_model: bool = False
    exams: tuple[EvalWorkload, ...] = ()
    turns: bool = False

    @property
    def answers(self) -> int:
        """Answers of the largest exam."""
        return max((exam.answers for exam in self.exams), default=0)

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.prompts_per_step * self.group_size

    def drawn(self, completions: int, prompts: int, prompt_tokens: int, max_tokens: int) -> tuple[int, int, int, int]:
        """The same four numbers of what the engine is given at the most."""
        if not self.turns:
            return completions, prompts, prompt_tokens, max_tokens
        return completions, completions, prompt_tokens + max_tokens, max_tokens

    def micro_batches(self, budget: int) -> list[list[tuple[int, list[int]]]]:
        """The layouts that `pack` makes of a step whose prompts and completions all have the greatest length."""
        own, tokens = self.max_tokens - 1, 0
        made: list[list[tuple[int, list[int]]]] = []
        for number in range(self.completions):
            continues = bool(made) and number % self.group_size > 0
            needed = own if continues else own + self.prompt_tokens
            if not made or tokens + needed > budget:
                made.append([(self.prompt_tokens, [])])
                tokens, needed = 0, own + self.prompt_tokens
            elif not continues:
                made[-1].append((self.prompt_tokens, []))
            made[-1][-1][1].append(own)
            tokens += needed
        return made

    @property
    def smallest(self) -> int:
        """Tokens of the smallest micro-batch: one completion with its prompt."""
        return self.prompt_tokens + self.max_tokens - 1


@dataclass(frozen=True)
class Footprint:
    """What a model takes, whatever is asked of it; in bytes.

    `process`: Python, torch and all that is resident before the weights are. `gradients`: as many bytes as there are
    of trainable weights. `critic`: the weights of a value or reward
    model, its optimizer's state and copies. `prepared`: copies of
    weights in the dtype of products, alive while something is computed. `kept`: what forward keeps for backward, a
    coefficient for each of `_terms`. `cache_token`: keys and values of one token in all layers. `state_token`: one
    hidden state. `logits_token`: the logits of one token in float32. `wide`: bytes of a number outside products.
    """

    process: int
    weights: int
    gradients: int
    reference: int
    critic: int
    prepared: int
    kept: tuple[float, ...]
    layers: int
    cache_token: int
    state_token: int
    logits_token: int
    wide: int

    def activations(self, layout: Layout, recompute: bool) -> int:
        """What forward keeps for backward; recomputing, each layer's input and all of one layer."""
        kept = sum(rate * term for rate, term in zip(self.kept, _terms(layout), strict=True))
        if not recompute:
            return int(kept)
        return int(kept / self.layers) + self.layers * self.state_token * _tokens(layout)


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the peak of its phase; see `parts` for what is alive when.

    `work` and `evaluation_work`: temporaries of computing prompts and drawing tokens; `logits`: of log-probabilities,
    forward and backward. `gradients`: those that are there beside all activations.
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

    def parts(self, phase: str) -> dict[str, int]:
        """What is alive in a phase, by name."""
        standing = ("process", "weights", "optimizer", "reference", "critic", "reward_model", "prepared")
        own = {
            "sampling": {"cache": self.cache, "work": self.work},
            "evaluation": {"cache": self.evaluation_cache, "work": self.evaluation_work},
            "training": {"gradients": self.gradients, "activations": self.activations, "logits": self.logits},
        }[phase]
        return {name: getattr(self, name) for name in standing} | own

    @property
    def sampling(self) -> int:
        """The peak while completions are drawn."""
        return sum(self.parts("sampling").values())

    @property
    def training(self) -> int:
        """The peak while gradients are computed."""
        return sum(self.parts("training").values())

    @property
    def evaluation(self) -> int:
        """The peak while questions are answered; without an evaluation, what is there anyway."""
        return sum(self.parts("evaluation").values())

    @property
    def peak(self) -> int:
        """The most that is alive at a time."""
        return max(self.sampling, self.training, self.evaluation)

    def as_dict(self) -> dict[str, Any]:
        """Peak, and the parts of each phase."""
        return {"peak": self.peak, **{phase: self.parts(phase) for phase in PHASES}}


@dataclass(frozen=True)
class ChosenSizes:
    """Sizes under a budget, and the memory that they come to. `recompute`: compute activations again in backward."""

    micro_batch_tokens: int
    slots: int
    recompute: bool
    budget_bytes: int
    memory: Memory


def process_bytes(device: torch.device) -> int:
    """What this process holds by now and the forecast counts: resident bytes on a CPU; on an accelerator nothing, as
    its memory is counted by what torch allocates there."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


def budget_bytes(memory: float | str, device: torch.device) -> int:
    """The recipe's `run.memory` in bytes, for the whole process: call it before the weights are loaded."""
    if isinstance(memory, str):
        return as_bytes(memory)
    return int(memory * (free_memory(device) + process_bytes(device)))


def measure_footprint(policy: LanguageModel, process: int, progress: Progress) -> Footprint:
    """What the model takes, by trial and by count. `process`: see `process_bytes`, from before the weights were
    there."""
    config, weight = policy.model.config.get_text_config(), policy.head.weight
    wide = torch.promote_types(policy.dtype, torch.float32).itemsize
    prepared, *kept = _measure_kept(policy, progress)
    release_memory()
    return Footprint(
        process=process + (LATER if policy.device.type == "cpu" else 0),
        weights=_bytes_of([*policy.model.parameters(), *policy.model.buffers()]),
        gradients=_bytes_of([each for each in policy.model.parameters() if each.requires_grad]),
        reference=_reference_bytes(policy),
        critic=_critic_bytes(policy),
        prepared=int(prepared) + prepared_bytes(policy),
        kept=tuple(kept),
        layers=max(1, int(config.num_hidden_layers)),
        cache_token=policy.cache_bytes,
        state_token=wide * weight.shape[1],
        logits_token=wide * weight.shape[0],
        wide=wide,
    )


def prepared_bytes(policy: LanguageModel) -> int:
    """Copies of weights that are not seen in what autograd keeps: those of the fused body."""
    held = {each.untyped_storage().data_ptr() for each in policy.model.parameters()}
    if policy.body is None or not policy.body.trains:
        return 0
    made = [linear.weight for layer in policy.body.prepare(policy.dtype, pack=False) for linear in layer.products]
    return _bytes_of([each for each in made if each.untyped_storage().data_ptr() not in held])


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum({each.untyped_storage().data_ptr(): each.numel() * each.itemsize for each in tensors}.values())


def _reference_bytes(policy: LanguageModel) -> int:
    """See `LanguageModel.frozen_copy`: products in their dtype, everything else as in the policy."""
    shared = {id(module.weight) for module in policy.model.modules() if isinstance(module, nn.Embedding)}
    narrow = [
        each
        for module in policy.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in shared
        for each in module.parameters()
    ]
    saved = sum(each.numel() * (each.itemsize - policy.dtype.itemsize) for each in narrow)
    return _bytes_of([*policy.model.parameters(), *policy.model.buffers()]) - saved


def _critic_bytes(policy: LanguageModel) -> int:
    """A value or reward model of the policy's size: all of it is trained, adapters or not. Its gradients come where
    those of the policy were."""
    wide = torch.promote_types(policy.dtype, torch.float32).itemsize
    count = sum(each.numel() for each in policy.model.parameters())
    return count * (3 * wide + policy.dtype.itemsize)


def _terms(layout: Layout) -> list[int]:
    """What the bytes kept can be proportional to: tokens of prompts, tokens of completions, completions, the copies of
    a prompt that stand before them, their mask, their scores and those of prompts where attention is written out."""
    made = [0] * 7
    for prompt, completions in layout:
        count, own = len(completions), max(completions, default=0)
        row = own * (prompt + own)
        terms = (prompt, sum(completions), count, count * prompt, row, count * row, prompt * prompt)
        made = [before + term for before, term in zip(made, terms, strict=True)]
    return made


def _tokens(layout: Layout) -> int:
    return sum(prompt + sum(completions) for prompt, completions in layout)


def _measure_kept(policy: LanguageModel, progress: Progress) -> list[float]:
    """Bytes that do not grow with the tokens (prepared weights), then those a unit of each of `_terms`."""
    rows, kept = [], []
    with policy.precision(), progress.bar("Measuring memory", len(_TRIALS), "trials") as advance:
        for prompt, count, own in _TRIALS:
            layout = [(prompt, [own] * count)]
            rows.append([1.0, *map(float, _terms(layout))])
            kept.append(float(saved_bytes(policy, layout)))
            advance(1)
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64))
    return [max(0.0, each) for each in solved.tolist()]


def saved_bytes(policy: LanguageModel, layout: Layout) -> int:
    """Bytes of all that autograd keeps of a forward on this layout, parameters apart; call it in `precision()`."""
    owned = [*policy.model.parameters(), *policy.model.buffers()]
    held = {each.untyped_storage().data_ptr() for each in owned}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that held its own output would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = score(policy, trial_batch(policy, layout), 1.0)  # alive until all is counted
    del result
    return sum(seen.values())


def trial_batch(policy: LanguageModel, layout: Layout) -> Batch:
    """A micro-batch of that layout, of arbitrary tokens."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    members = []
    for index, (prompt, completions) in enumerate(layout):
        end = len(ids) + prompt
        ids += range(1, prompt + 1)
        positions += range(prompt)
        for number, own in enumerate(completions):
            predictors += [end - 1, *range(len(ids), len(ids) + own)]
            ids += range(prompt + number, prompt + number + own)
            positions += range(prompt, prompt + own)
            members.append((index, number, own + 1))
    vocabulary = int(policy.model.config.get_text_config().vocab_size)
    device, count = policy.device, len(predictors)
    return Batch(
        token_ids=torch.tensor([each % vocabulary for each in ids], device=device),
        positions=torch.tensor(positions, device=device),
        layout=[(prompt, [own for own in completions if own]) for prompt, completions in layout],
        predictors=torch.tensor(predictors, device=device),
        targets=torch.zeros(count, dtype=torch.long, device=device),
        advantages=torch.ones(count, device=device),
        weights=torch.ones(count, device=device),
        sampling_logprobs=torch.zeros(count, device=device),
        members=members,
    )


def forecast_memory(
    footprint: Footprint, workload: Workload, micro_batch_tokens: int, slots: int, recompute: bool = False
) -> Memory:
    """The memory of a run with these sizes, if every prompt and every completion has the greatest length.

    Where a step is several micro-batches, they are taken to be full: shorter completions fill what longer ones leave.
    """
    layouts = workload.micro_batches(micro_batch_tokens)
    layout = max(layouts, key=lambda each: footprint.activations(each, recompute))
    activations = footprint.activations(layout, recompute)
    if len(layouts) > 1:
        activations = int(activations * max(1.0, micro_batch_tokens / _tokens(layout)))
    logits = _logits(footprint, layout)
    gradients = footprint.gradients
    if len(layouts) == 1:  # they come as activations go
        gradients = max(0, gradients - activations - logits)
    step = workload.completions, workload.prompts_per_step, workload.prompt_tokens, workload.max_tokens
    cache, work = _generation(footprint, slots, *workload.drawn(*step))
    exams = [
        _generation(
            footprint,
            slots,
            *workload.drawn(exam.answers, exam.questions, exam.question_tokens, exam.answer_tokens),
        )
        for exam in workload.exams
    ]
    evaluation_cache, evaluation_work = max(exams, key=sum, default=(0, 0))
    return Memory(
        process=footprint.process,
        weights=footprint.weights,
        optimizer=2 * footprint.gradients,
        reference=footprint.reference if workload.reference else 0,
        critic=footprint.critic if workload.critic else 0,
        reward_model=footprint.critic if workload.reward_model else 0,
        prepared=_resident(footprint.prepared),
        cache=_resident(cache),
        work=_resident(work),
        evaluation_cache=_resident(evaluation_cache),
        evaluation_work=_resident(evaluation_work),
        gradients=_resident(gradients),
        activations=_resident(activations),
        logits=_resident(logits),
    )


def _resident(allocated: int) -> int:
    return int(FRAGMENTS * allocated)


def _logits(footprint: Footprint, layout: Layout) -> int:
    """The dearest moment of `token_logprobs`: a chunk's logits for a part of the vocabulary, three times; where a head
    has no gradient to add to, that gradient too, which `Footprint.gradients` counts already."""
    chunk = min(CHUNK_SIZE, sum(own + 1 for _, completions in layout for own in completions))
    part = min(PART_SIZE, footprint.logits_token // footprint.wide)
    return 3 * chunk * part * footprint.wide


def _generation(
    footprint: Footprint, slots: int, completions: int, prompts: int, prompt_tokens: int, max_tokens: int
) -> tuple[int, int]:
    """The key-value stores, and the temporaries of the engine: of computing prompts, or of a decoding step.

    Computing prompts holds their keys and values once more, and what a layer makes of each token; a decoding step the
    logits of each row three times, and one layer's stores once more.
    """
    rows, places = min(slots, completions), min(slots, prompts)
    cache = footprint.cache_token * (rows * max_tokens + places * prompt_tokens)
    together = min(places, max(1, PREFILL_TOKENS // prompt_tokens))
    layer = footprint.activations([(prompt_tokens, ())] * together, recompute=False) // footprint.layers
    prefill = footprint.cache_token * together * prompt_tokens + layer
    decoding = 3 * footprint.logits_token * rows + cache // footprint.layers
    return cache, max(prefill, decoding)


def choose_sizes(footprint: Footprint, workload: Workload, budget: int) -> ChosenSizes:
    """The largest sizes whose forecast is within the budget; activations are recomputed only where not even one
    completion could be trained on otherwise. Raises UsageError where nothing fits."""

    def memory(tokens: int, slots: int, recompute: bool) -> Memory:
        return forecast_memory(footprint, workload, tokens, slots, recompute)

    def fits(recompute: bool, tokens: int) -> bool:
        return memory(tokens, 1, recompute).training <= budget

    most = max(1, min(MAX_SLOTS, max(workload.completions, workload.answers)))
    slots = _largest(
        1, most, lambda each: max(memory(1, each, True).sampling, memory(1, each, True).evaluation) <= budget
    )
    highest = most_tokens(workload.prompt_tokens)
    least = min(workload.smallest, highest)
    for recompute in (False, True):
        tokens = _largest(least, highest, partial(fits, recompute))
        if slots and tokens:
            return ChosenSizes(tokens, slots, recompute, budget, memory(tokens, slots, recompute))
    raise _too_little(memory(least, 1, True), workload, budget)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits, 0 where none does. All below one that fits do so too, but for
    the highest: a step in one micro-batch has no gradients beside its activations."""
    if fits(high):
        return high
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _too_little(least: Memory, workload: Workload, budget: int) -> UsageError:
    phase = max(PHASES, key=lambda each: getattr(least, each))
    part, size = max(least.parts(phase).items(), key=lambda item: item[1])
    return UsageError(
        f"run.memory: allows {_gigabytes(budget)}, and {phase} needs at least {_gigabytes(least.peak)}, most of it for "
        f"{part} ({_gigabytes(size)}), with one completion of {workload.prompt_tokens} + {workload.max_tokens} tokens "
        f'at a time; allow more (a larger share, or e.g. "{least.peak / 1e9 + 0.1:.1f} GB"), or write a smaller '
        "sampling.max_tokens, a smaller task.max_prompt_tokens, a smaller model, or method.kl_coef = 0"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
