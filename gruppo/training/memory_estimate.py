"""Estimates a run's peak memory, and chooses the sizes that keep it within the recipe's budget.

The tensors that a model keeps for backward are measured on the model itself, in a trial of a few dozen tokens. The rest
is counted, with one documented function per part. Nothing here changes a result: results do not depend on
micro-batches, slots or recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gruppo.engines.memory import Decoding, Sampled, fragments, largest, sampling_bytes
from gruppo.engines.native.engine import MAX_SLOTS
from gruppo.errors import UsageError
from gruppo.models.footprint import Footprint, Layout, layout_tokens
from gruppo.models.logprobs import logit_block
from gruppo.models.packing import most_tokens

PHASES = ("sampling", "training", "evaluation")


@dataclass(frozen=True)
class EvalWorkload:
    """Upper bounds of one evaluation set; lengths in tokens. `times`: how often a run evaluates it. `decoding`: see
    `gruppo.engines.memory.decoding_of`."""

    name: str
    questions: int
    samples: int
    question_tokens: int
    answer_tokens: int
    times: int
    decoding: Decoding = "greedy"

    @property
    def answers(self) -> int:
        """Answers per evaluation."""
        return self.questions * self.samples

    @property
    def sampled(self) -> Sampled:
        """What the engine samples."""
        return Sampled(self.answers, self.questions, self.question_tokens, self.answer_tokens, self.decoding)


@dataclass(frozen=True)
class Workload:
    """Upper bounds of a run's work; lengths in tokens.

    `reference`: there is a copy of the policy, which adapters do not need. `turns`: completions are sampled in several
    turns. `samples_elsewhere`: the engine has a process and memory of its own. `lag`: steps that sampling may be ahead
    of training; if not 0, both take memory at the same time. `engines`: there are several engines elsewhere, which get
    their weights from a copy. `shards`: of the weights, one for each of several ranks; 0 in a single process. `labels`:
    what is sampled for the labels of a reward model.
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
    labels: Sampled | None = None

    @property
    def answers(self) -> int:
        """Answers of the largest evaluation set."""
        return max((eval_set.answers for eval_set in self.eval_sets), default=0)

    @property
    def completions(self) -> int:
        """Completions per step."""
        return self.prompts_per_step * self.group_size

    @property
    def sampled(self) -> list[Sampled]:
        """What the engine samples for training: the completions of a step, and those that are labeled."""
        step = Sampled(self.completions, self.prompts_per_step, self.prompt_tokens, self.max_tokens, turns=self.turns)
        return [step, *([self.labels] if self.labels else [])]

    @property
    def evaluated(self) -> list[Sampled]:
        """What the engine samples for evaluation."""
        return [replace(each.sampled, turns=self.turns) for each in self.eval_sets]

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
        return max(work.longest for work in (self.sampled[0], *self.evaluated))

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
    other ranks that a rank has for a moment. `answers`: those to an evaluation set, until they are written.

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
    answers: int = 0

    def parts(self, phase: str) -> dict[str, int]:
        """Bytes alive in a phase, by name."""
        always = ("process", "weights", "optimizer", "reference", "critic", "reward_model", "prepared")
        of_phase = {
            "sampling": {"cache": self.cache, "work": self.work},
            "evaluation": {
                "cache": self.evaluation_cache,
                "work": self.evaluation_work,
                "answers": self.answers,
            },
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
    resident = partial(_resident, fragments(footprint))
    shards = workload.shards or 1
    gradients = footprint.gradients // shards
    if len(layouts) == 1:  # gradients are allocated while activations are freed
        gradients = max(0, gradients - activations - logits)
    elsewhere = workload.samples_elsewhere
    cache, work = _largest_sampling(footprint, slots, () if elsewhere else workload.sampled)
    evaluation_cache, evaluation_work = _largest_sampling(footprint, slots, () if elsewhere else workload.evaluated)
    return Memory(
        process=footprint.process,
        weights=footprint.weights // shards,
        optimizer=footprint.moments // shards,
        reference=footprint.reference // shards if workload.reference else 0,
        critic=footprint.critic // shards if workload.critic else 0,
        reward_model=footprint.critic // shards if workload.reward_model else 0,
        prepared=0 if workload.shards else resident(footprint.prepared),
        cache=cache,
        work=work,
        evaluation_cache=evaluation_cache,
        evaluation_work=evaluation_work,
        gradients=resident(gradients),
        activations=resident(activations),
        logits=resident(logits),
        backward=resident(backward),
        versions=_versions(footprint, workload),
        lags=workload.lag > 0,
        gathered=footprint.gathered if workload.shards else 0,
        answers=max((each.answers_bytes for each in workload.evaluated), default=0),
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


def _largest_sampling(footprint: Footprint, slots: int, works: Sequence[Sampled]) -> tuple[int, int]:
    return max((sampling_bytes(footprint, slots, work) for work in works), key=sum, default=(0, 0))


def _resident(fragments: float, allocated: int) -> int:
    return int(fragments * allocated)


def _logits(footprint: Footprint, layout: Layout) -> int:
    """The peak of `token_logprobs`: the logits that it keeps, and three times those of a chunk for a part of the
    vocabulary; on an accelerator also their part of the weight's gradient, which is the whole weight.

    A head without a gradient also needs that gradient, which `Footprint.gradients` already counts.
    """
    vocabulary = footprint.logits_token // footprint.wide
    if not vocabulary:  # a reward model
        return 0
    most, entries, room = logit_block(vocabulary, footprint.wide, footprint.accelerator)
    tokens = sum(length + 1 for _, completions in layout for length in completions)
    chunk, part = min(most, tokens), min(entries, vocabulary)
    kept = min(room, tokens * vocabulary * footprint.kept_logit)
    return kept + 3 * chunk * part * footprint.wide + (part * footprint.state_token if footprint.accelerator else 0)


SMALLER = "a smaller sampling.max_tokens, a smaller task.max_prompt_tokens, a smaller model, or method.kl_coef = 0"


def choose_sizes(footprint: Footprint, workload: Workload, budget: int, smaller: str = SMALLER) -> ChosenSizes:
    """The largest sizes whose estimated memory is within the budget.

    Activations are recomputed only if otherwise not even one completion could be trained on. If a run samples while it
    trains, sampling gets at most half of what neither needs at least. Raises UsageError if nothing fits. `smaller`:
    what it advises to use.
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
    slots = largest(1, most, holds)
    for recompute in (False, True):
        tokens = largest(least, highest, partial(fits, recompute))
        if slots and tokens:
            return ChosenSizes(tokens, slots, recompute, budget, memory(tokens, slots, recompute))
    raise _too_little(memory(least, 1, True), workload, budget, smaller)


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


def _too_little(least: Memory, workload: Workload, budget: int, smaller: str) -> UsageError:
    phase = max(PHASES, key=lambda name: getattr(least, name))
    part, size = max(least.parts(phase).items(), key=lambda item: item[1])
    return UsageError(
        f"run.memory: allows {_gigabytes(budget)}, but {phase} needs at least {_gigabytes(least.peak)}, most of it for "
        f"{part} ({_gigabytes(size)}), with one completion of {workload.prompt_tokens} + {workload.max_tokens} tokens "
        f'at a time; raise it (a larger share, or e.g. "{least.peak / 1e9 + 0.1:.1f} GB"), or use {smaller}'
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
