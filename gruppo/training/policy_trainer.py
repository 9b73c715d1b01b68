"""Trains the policy: scores its tokens, packs them into micro-batches, and performs the updates of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gruppo.config.recipe import Recipe
from gruppo.config.schedule import learning_rate
from gruppo.errors import out_of_memory
from gruppo.models.packing import Batch, Part, TokenWeights, pack, split
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import ALONE, Ranks, metrics_of_all, on_all_ranks
from gruppo.models.weights import WeightSource, copy_weights, named_weights
from gruppo.rollout.source import Step
from gruppo.runs.reading import reading
from gruppo.training.checkpoint import put_weights
from gruppo.training.gradient_noise import HalfGradient, split_in_halves
from gruppo.training.nonfinite import Guard, not_finite
from gruppo.training.optimizer import accumulate, update
from gruppo.training.policy_loss import (
    batch_loss,
    is_fresh,
    keep_logprobs,
    put_logprobs,
    score_batches,
    score_old,
    token_weights,
)
from gruppo.training.shard_files import TensorFiles
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Progress
from gruppo.utils.system import release_memory


class StepBatches:
    """The micro-batches of an update, which can be repacked into smaller ones if memory runs out.

    Token weights are fixed over the `part` of the step's completions that the update learns from. `old_from_engine`:
    π_old is the distribution that the engine sampled from, not what the trainer's first update computes. `updated`: the
    policy has changed since it was scored, so the log-probabilities in the batches cannot be recomputed and move with
    their tokens. `number`: of the minibatch in its step. The batches are the share of one of the `ranks`, which has one
    if any rank has.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        weights: TokenWeights,
        policy: LanguageModel,
        with_kl: bool,
        tokens: int,
        old_from_engine: bool = False,
        part: Part | None = None,
        number: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.groups, self.weights, self.policy, self.with_kl, self.part = groups, weights, policy, with_kl, part
        self.tokens, self.old_from_engine, self.updated = tokens, old_from_engine, False
        self.number, self.ranks = number, ranks
        self.batches = self._pack()

    def __bool__(self) -> bool:
        return bool(self.batches)

    def at(self, tokens: int) -> list[Batch]:
        """The micro-batches, with at most `tokens` tokens each."""
        if tokens != self.tokens:
            if self.updated:
                self.keep_logprobs()
            self.tokens = tokens
            self.batches = self._pack()
            if self.updated:
                put_logprobs(self.groups, self.batches, torch.promote_types(self.policy.dtype, torch.float32))
        return self.batches

    def keep_logprobs(self) -> None:
        """Copy what was computed for the tokens of the batches to the groups."""
        keep_logprobs(self.groups, self.batches, self.ranks)

    def _pack(self) -> list[Batch]:
        batches = pack(
            self.groups, self.weights, self.tokens, self.with_kl, self.policy.device, self.part, self.ranks.share
        )
        if self.old_from_engine:
            for batch in batches:
                batch.old_logprobs = batch.sampling_logprobs
        return batches


@dataclass(frozen=True)
class Learner:
    """One model's side of an update.

    `computed_by` computes the forward pass; `module` holds the trained parameters; `prefix` and `rate_field` are for
    messages.
    """

    computed_by: LanguageModel
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    sizes: BatchSizes
    guard: Guard
    progress: Progress
    prefix: str = ""
    rate_field: str = "optimizer.learning_rate"
    ranks: Ranks = ALONE

    def update(
        self,
        batches: StepBatches,
        loss_of: Callable[[Batch], torch.Tensor],
        rate: float,
        number: int,
        metrics: Metrics,
        observe: Callable[[], None] = lambda: None,
    ) -> tuple[float, float]:
        """Perform update `number` (from 0) of a step, on one of its parts. Returns its loss and gradient norm.

        `observe`: called when the module has the gradient.

        If memory runs out, the update is retried in smaller micro-batches, as if it had not been attempted before.
        """

        def require(value: float, what: str, checked: Sequence[Batch]) -> None:
            self.guard.require(value, self.prefix + what, checked, number, self.rate_field)

        def attempt(tokens: int) -> tuple[float, float]:
            packed = batches.at(tokens)
            with self.progress.bar("Updating", len(packed), "batches") as advance, metrics.all_or_nothing():
                return update(
                    packed,
                    loss_of,
                    self.computed_by,
                    self.module,
                    self.optimizer,
                    rate,
                    self.max_grad_norm,
                    require,
                    advance,
                    self.ranks,
                    observe,
                )

        return self.sizes.run_with_retry("micro_batch_tokens", "updating", attempt)


class PolicyTrainer:
    """Trains the policy. `reference`: π_ref, if the method needs one; it is replaced in every iteration."""

    def __init__(
        self,
        policy: LanguageModel,
        reference: LanguageModel | None,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        sizes: BatchSizes,
        guard: Guard,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.policy, self.reference, self.optimizer, self.ranks = policy, reference, optimizer, ranks
        self.recipe, self.method, self.sizes, self.guard = recipe, recipe.method, sizes, guard
        max_grad_norm = recipe.optimizer.max_grad_norm
        self.learner = Learner(policy, policy.model, optimizer, max_grad_norm, sizes, guard, progress, ranks=ranks)
        self._weights = token_weights(self.method, recipe.sampling.max_tokens)

    @property
    def weights(self) -> WeightSource:
        """The policy's weights, for engines."""
        return WeightSource(self.policy.model, self.whole_weights)

    @on_all_ranks
    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the saved model with its name. Every rank must iterate to the end."""
        for name, tensor in self.policy.weight_source():
            yield name, self.ranks.whole(tensor)

    def rate(self, step: Step) -> float:
        """The learning rate of a step."""
        return learning_rate(self.recipe.optimizer, step.number - 1, self.recipe.run.steps)

    def score(self, groups: Sequence[Group], step: Step) -> None:
        """Fill in π_old and π_ref of trained completions if advantages depend on them (KL in the reward, pairs)."""
        if self.method.needs_scores:
            self._score(groups, step)

    @on_all_ranks
    def _score(self, groups: Sequence[Group], step: Step) -> None:
        policy, reference = self.policy, self.reference
        assert reference is not None
        with step.timer("score"):
            tokens = self.sizes.micro_batch_tokens
            packed = StepBatches(groups, self._weights, policy, with_kl=True, tokens=tokens, ranks=self.ranks)

            def attempt(tokens: int) -> Sequence[Batch]:
                batches = packed.at(tokens)
                with metrics_of_all(self.ranks, step.metrics) as metrics, metrics.all_or_nothing():
                    score_batches(policy, reference, batches, self.recipe.sampling.temperature, metrics)
                return batches

            batches = self.sizes.run_with_retry("micro_batch_tokens", "scoring", attempt)
            self._require_finite(batches)
            packed.keep_logprobs()

    @on_all_ranks
    def pack(self, groups: Sequence[Group], step: Step) -> list[StepBatches]:
        """The step's minibatches, in micro-batches; without those in which nothing would change the policy."""
        with_all = self.method.kl_in_loss or self.method.needs_critic
        from_engine = self.method.old_logprobs == "engine"
        tokens = self.sizes.micro_batch_tokens
        packed = [
            StepBatches(groups, self._weights, self.policy, with_all, tokens, from_engine, part, number, self.ranks)
            for number, part in enumerate(split(groups, self.method.minibatches))
        ]
        minibatches = [batches for batches in packed if batches]
        if not from_engine:
            for later in minibatches[1:]:  # the policy will have changed when their turn comes
                self._score_old(later, step)
        release_memory()  # blocks that one phase has freed would be too fragmented for the next
        return minibatches

    def _score_old(self, minibatch: StepBatches, step: Step) -> None:
        """Fill in π_old and entropies of a minibatch."""

        def attempt(tokens: int) -> Sequence[Batch]:
            batches = minibatch.at(tokens)
            with metrics_of_all(self.ranks, step.metrics) as metrics, metrics.all_or_nothing():
                fresh = is_fresh(minibatch.groups, step.number)
                score_old(self.policy, batches, self.method, self.recipe.sampling.temperature, metrics, fresh)
            return batches

        with step.timer("score"):
            self._require_finite(self.sizes.run_with_retry("micro_batch_tokens", "scoring", attempt))
        minibatch.updated = True

    def _require_finite(self, batches: Sequence[Batch]) -> None:
        wrong = [(name, batch) for batch in batches for name in not_finite(batch)]
        for name, batch in [found for share in self.ranks.gather(wrong[:1]) for found in share]:
            self.guard.require(math.nan, name, [batch])

    @on_all_ranks
    def update(self, batches: StepBatches, number: int, step: Step) -> None:
        """Update `number` (from 0) of the step, on one of its minibatches; the loss is a sum over micro-batches."""
        half = self._half_gradient(batches, step) if self._measures_noise(batches, number, step) else None
        observe = partial(half.compare, step.metrics) if half else lambda: None
        with step.timer("update"), metrics_of_all(self.ranks, step.metrics) as metrics:
            loss = self._loss(batches, step, metrics)
            total, norm = self.learner.update(batches, loss, self.rate(step), number, metrics, observe)
        batches.updated = True
        step.metrics.mean("loss/total", total)
        step.metrics.mean("optimizer/gradient_norm", norm)
        step.metrics.mean("optimizer/clipped", norm > self.recipe.optimizer.max_grad_norm)

    def _loss(self, batches: StepBatches, step: Step, metrics: Metrics) -> Callable[[Batch], Tensor]:
        return partial(
            batch_loss,
            self.policy,
            self.reference,
            settings=self.method,
            temperature=self.recipe.sampling.temperature,
            metrics=metrics,
            fresh=is_fresh(batches.groups, step.number),
        )

    def _measures_noise(self, batches: StepBatches, number: int, step: Step) -> bool:
        every = self.recipe.run.noise_every
        return every > 0 and step.number % every == 0 and number == 0 and not batches.updated

    def _half_gradient(self, batches: StepBatches, step: Step) -> HalfGradient | None:
        """The gradient of half of the groups of the step's first update. None if there are too few, or no memory.

        The pass has micro-batches and metrics of its own, and leaves no gradient behind, so it changes nothing.
        """
        halves = split_in_halves(batches.groups, batches.part, batches.weights, step.number)
        if halves is None:
            return None
        module = self.policy.model
        self.optimizer.zero_grad(set_to_none=True)
        with step.timer("noise"):
            try:
                packed = StepBatches(
                    batches.groups, halves.weights, self.policy, batches.with_kl, batches.tokens,
                    batches.old_from_engine, halves.part, ranks=self.ranks,
                )  # fmt: skip
                accumulate(packed.batches, self._loss(packed, step, Metrics()), self.policy, lambda _: None)
                return HalfGradient(module, halves, self.ranks)
            except (MemoryError, RuntimeError) as error:
                if self.ranks.size > 1 or not out_of_memory(error):
                    raise
                return None
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                release_memory()

    @on_all_ranks
    def keep_logprobs(self, minibatches: Sequence[StepBatches]) -> None:
        """Copy what was computed for the tokens of the step's minibatches to its groups, to be recorded."""
        for minibatch in minibatches:
            minibatch.keep_logprobs()

    @on_all_ranks
    def replace_reference(self) -> None:
        """π_ref ← π_θ."""
        self._freeze()

    @on_all_ranks
    def load_reference(self, file: Path) -> None:
        """Load the reference from a file of whole weights. They pass through the policy, which has them afterwards."""
        with reading(file, "use the previous checkpoint"), TensorFiles(file.parent, file.stem) as files:
            put_weights(files, named_weights(self.policy.model))
        self.policy.generation.advance()
        self._freeze()

    def _freeze(self) -> None:
        if self.policy.sharded and self.reference is not None:
            copy_weights(self.policy.model, self.reference.model)
        else:
            self.reference = None  # free it before the new one is created
            self.reference = self.policy.frozen_copy()
