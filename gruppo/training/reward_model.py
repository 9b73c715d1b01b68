"""Training a reward model on labeled completions, with replay, and measuring it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gruppo.algorithms.losses import reward_model_loss
from gruppo.config.sections import RewardModel
from gruppo.errors import RunError
from gruppo.models.packing import Batch
from gruppo.models.ranks import ALONE, Ranks, on_all_ranks
from gruppo.models.value_head import ScalarModel, pack_states
from gruppo.rewards.grading.last_number import last_number
from gruppo.rollout.reward_model import RewardModelScorer, Sample, grouped_samples
from gruppo.training.optimizer import RequireFinite, update
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.random_numbers import generator_of
from gruppo.utils.signals import Stop
from gruppo.utils.stats import auc, calibration_error


def label_batches(
    model: ScalarModel, samples: Sequence[Sample], budget: int, ranks: Ranks = ALONE
) -> tuple[list[Batch], Callable[[Batch], Tensor]]:
    """Micro-batches of the samples and the loss of one batch. The sum of the losses is the mean over all labels."""
    groups, places = grouped_samples(samples)
    batches = pack_states(groups, budget, model.policy.device, ranks.share)
    total = sum(len(sample.labels.ends) for sample in samples)

    def loss(batch: Batch) -> Tensor:
        rows: list[int] = []
        labels: list[float] = []
        start = 0
        for index, number, length in batch.members:
            sample = samples[places[index, number]]
            rows += [start + end + 1 for end in sample.labels.ends]
            labels += sample.labels.rewards
            start += length
        numbers = model.numbers(batch)
        target = torch.tensor(labels, dtype=numbers.dtype, device=numbers.device)
        at = numbers[torch.tensor(rows, dtype=torch.long, device=numbers.device)]
        return reward_model_loss(at, target, torch.full_like(target, 1 / max(1, total)))

    return batches, loss


def minibatches(samples: Sequence[Sample], settings: RewardModel, turn: int) -> Iterator[list[Sample]]:
    """The samples of every update, epoch after epoch, at most `batch_size` at a time.

    The seed and `turn` determine the order of the prompts. The completions of a prompt stay together.
    """
    together: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        together[sample.prompt.token_ids].append(sample)
    prompts = list(together.values())
    for epoch in range(settings.epochs):
        order = generator_of((settings.seed, turn, 1, epoch)).permutation(len(prompts))
        row = [sample for place in order for sample in prompts[place]]
        for start in range(0, len(row), settings.batch_size):
            yield row[start : start + settings.batch_size]


def replayed(history: Sequence[Sample], new: int, settings: RewardModel, turn: int) -> list[Sample]:
    """Samples of earlier rounds that make up the share `replay_fraction` of a training set with `new` new samples.

    They are sampled without repetition from the last `replay_capacity` of `history`; fewer if there are not enough.
    """
    kept = history[-settings.replay_capacity :] if settings.replay_capacity else []
    wanted = round(settings.replay_fraction * new / (1 - settings.replay_fraction))
    chosen = generator_of((settings.seed, turn, 2)).permutation(len(kept))[:wanted]
    return [kept[place] for place in sorted(chosen)]


def divided(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and held-out samples.

    A question is on the same side in every round, because a hash of its tokens decides.
    """

    def is_held_out(sample: Sample) -> bool:
        digest = hashlib.sha256(repr((seed, sample.prompt.token_ids)).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    sides = [is_held_out(sample) for sample in samples]
    return (
        [sample for sample, out in zip(samples, sides, strict=True) if not out],
        [sample for sample, out in zip(samples, sides, strict=True) if out],
    )


def quality(samples: Sequence[Sample], probabilities: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Metrics of a model's probabilities on labeled samples; except for counts from 0 to 1, and None if undefined.

    accuracy (a probability above ½ against a label above ½), auc, calibration_error (10 bins), labels (their number),
    positives (the number of labels above ½). Over the questions with several completions: mean (the share of correct
    completions), best_of_n (the completion with the highest probability; for a process model, with the highest minimum
    over its steps), majority_vote (the most common answer: its last number, or else its text), any_right. Ties are
    averaged.
    """
    flat = np.array([probability for row in probabilities for probability in row])
    labels = np.array([label for sample in samples for label in sample.labels.rewards])
    positive = labels > 0.5
    figures: dict[str, float | None] = {"labels": float(len(labels)), "positives": float(positive.sum())}
    if len(flat):
        figures["accuracy"] = float(((flat > 0.5) == positive).mean())
        figures["auc"] = auc(flat, positive)
        figures["calibration_error"] = calibration_error(flat, labels)
    together: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        together[sample.prompt.id].append(place)
    questions = [indices for indices in together.values() if len(indices) > 1]
    if not questions:
        return figures
    shares: dict[str, list[float]] = defaultdict(list)
    for indices in questions:
        correct = np.array([samples[place].right for place in indices], dtype=float)
        scores = np.array([min(probabilities[place], default=0.0) for place in indices])
        answers = [_answer(samples[place].completion.text) for place in indices]
        votes = np.array([answers.count(answer) for answer in answers])
        shares["mean"].append(float(correct.mean()))
        shares["best_of_n"].append(float(correct[scores == scores.max()].mean()))
        shares["majority_vote"].append(float(correct[votes == votes.max()].mean()))
        shares["any_right"].append(float(correct.max()))
    return figures | {name: float(np.mean(values)) for name, values in shares.items()}


def _answer(text: str) -> object:
    number = last_number(text)
    return text.strip() if number is None else number


def alike(samples: Sequence[Sample]) -> str | None:
    """A warning, in words, if all labels to train on have the same value; None if they differ."""
    labels = [label for sample in samples for label in sample.labels.rewards]
    if len(set(labels)) != 1:
        return None
    return (
        f"all {len(labels)} labels that the reward model is trained on are {labels[0]:g}, so it can only learn to give "
        "every completion the same score; use questions that the policy answers correctly sometimes, or label more of "
        "them (reward_model.prompts)"
    )


@dataclass(frozen=True)
class RewardModelTrainer:
    """Trains a scorer's model. `optimizer`: of its weights. `max_grad_norm`: gradients are clipped to this norm."""

    scorer: RewardModelScorer
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    @property
    def settings(self) -> RewardModel:
        """The recipe's [reward_model]."""
        return self.scorer.settings

    @property
    def ranks(self) -> Ranks:
        """The ranks that train the model."""
        return self.scorer.ranks

    @on_all_ranks
    def update(self, row: Sequence[Sample], require_finite: RequireFinite) -> tuple[float, float]:
        """One update on a mini-batch. Returns its loss and gradient norm."""
        attempt = partial(_learn_from, self, row, require_finite)
        return self.scorer.sizes.run_with_retry("micro_batch_tokens", "training the reward model", attempt)

    def learn(
        self,
        new: Sequence[Sample],
        history: Sequence[Sample],
        turn: int,
        require_finite: RequireFinite,
        progress: Progress,
        stop: Stop,
        warn: Callable[[str], None] = lambda _: None,
    ) -> dict[str, float | None]:
        """Train on new samples and on replayed earlier samples; `turn`: the iteration, from 1.

        `warn`: called with a warning if all labels are alike.
        Returns metrics of the training, and of the held-out new samples before and after it.
        """
        training, held_out = divided(new, self.settings.held_out, self.settings.seed)
        earlier, _ = divided(history, self.settings.held_out, self.settings.seed)
        replay = replayed(earlier, len(training), self.settings, turn)
        if not any(sample.labels.ends for sample in training):
            raise RunError(
                f"reward_model: none of {len(new)} labeled completions has a label and is left to train on; see "
                "events.jsonl for rules that failed, or raise reward_model.prompts or lower reward_model.held_out"
            )
        if warning := alike([*training, *replay]):
            warn(warning)
        before = self.quality(held_out, progress)
        metrics = fit(self, [*training, *replay], turn, require_finite, progress, stop)
        after = self.quality(held_out, progress)
        return {
            "reward_model/new": float(len(training)),
            "reward_model/replayed": float(len(replay)),
            "reward_model/held_out": float(len(held_out)),
            "reward_model/right": sum(sample.right for sample in new) / len(new) if new else None,
            **metrics.reduce(),
            **{f"reward_model/before/{name}": value for name, value in before.items()},
            **{f"reward_model/after/{name}": value for name, value in after.items()},
        }

    def quality(self, samples: Sequence[Sample], progress: Progress) -> dict[str, float | None]:
        """See `gruppo.training.reward_model.quality`."""
        with progress.bar("Measuring the reward model", None, ""):
            return quality(samples, self.scorer.probabilities(samples, "measuring the reward model"))


def fit(
    trainer: RewardModelTrainer,
    samples: Sequence[Sample],
    turn: int,
    require_finite: RequireFinite,
    progress: Progress,
    stop: Stop,
    done: int = 0,
    after: Callable[[int, Metrics], None] = lambda number, metrics: None,
) -> Metrics:
    """Train the scorer's model on the samples, in mini-batches. Returns the metrics of all updates.

    `done`: number of updates that were done before. `after`: called after every update with its number and metrics.
    """
    settings, whole = trainer.settings, Metrics()
    rows = list(minibatches([sample for sample in samples if sample.labels.ends], settings, turn))
    with progress.bar("Training the reward model", len(rows), "updates") as show:
        show(done)
        for number, row in enumerate(rows[done:], start=done + 1):
            stop.check()
            total, norm = trainer.update(row, require_finite)
            of_update = Metrics()
            for metrics in (of_update, whole):
                metrics.mean("reward_model/loss", total)
                metrics.mean("reward_model/gradient_norm", norm)
            after(number, of_update)
            show(1)
    return whole


def _learn_from(
    trainer: RewardModelTrainer, row: Sequence[Sample], require_finite: RequireFinite, tokens: int
) -> tuple[float, float]:
    """One update on a mini-batch, in micro-batches of `tokens` tokens; see `gruppo.training.optimizer.update`."""
    model = trainer.scorer.model
    batches, loss_of = label_batches(model, row, tokens, trainer.ranks)
    return update(
        batches,
        loss_of,
        model.policy,
        model.module,
        trainer.optimizer,
        trainer.settings.learning_rate,
        trainer.max_grad_norm,
        require_finite,
        lambda _: None,
        trainer.ranks,
    )
