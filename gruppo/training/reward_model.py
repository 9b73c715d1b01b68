"""Training a reward model on labelled completions, with replay, and measuring it."""

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
from gruppo.models.value_head import ScalarModel, pack_states
from gruppo.rewards.grading.last_number import last_number
from gruppo.rollout.reward_model import RewardModelScorer, Sample, grouped_samples
from gruppo.training.optimizer import RequireFinite, update
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop
from gruppo.utils.stats import auc, calibration_error


def label_batches(
    model: ScalarModel, samples: Sequence[Sample], budget: int
) -> tuple[list[Batch], Callable[[Batch], Tensor]]:
    """Micro-batches of the samples and the loss of one of them; over all it is the mean over the labels."""
    groups, places = grouped_samples(samples)
    batches = pack_states(groups, budget, model.policy.device)
    total = sum(len(sample.labels.ends) for sample in samples)

    def loss(batch: Batch) -> Tensor:
        rows: list[int] = []
        labels: list[float] = []
        start = 0
        for index, number, length in batch.members:
            own = samples[places[index, number]].labels
            rows += [start + end + 1 for end in own.ends]
            labels += own.rewards
            start += length
        numbers = model.numbers(batch)
        wanted = torch.tensor(labels, dtype=numbers.dtype, device=numbers.device)
        at = numbers[torch.tensor(rows, dtype=torch.long, device=numbers.device)]
        return reward_model_loss(at, wanted, torch.full_like(wanted, 1 / max(1, total)))

    return batches, loss


def minibatches(samples: Sequence[Sample], settings: RewardModel, turn: int) -> Iterator[list[Sample]]:
    """What each update learns from, epoch after epoch: prompts in an order that the seed and `turn` decide, the
    completions of one together, cut where `batch_size` are there."""
    together: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        together[sample.prompt.token_ids].append(sample)
    prompts = list(together.values())
    for epoch in range(settings.epochs):
        order = _random(settings.seed, turn, 1, epoch).permutation(len(prompts))
        row = [sample for place in order for sample in prompts[place]]
        for start in range(0, len(row), settings.batch_size):
            yield row[start : start + settings.batch_size]


def replayed(history: Sequence[Sample], new: int, settings: RewardModel, turn: int) -> list[Sample]:
    """Samples of earlier rounds that make up the share `history` of a training set with `new` ones, drawn without
    repetition from the last `replay_capacity` of them; fewer where there are not so many."""
    kept = history[-settings.replay_capacity :] if settings.replay_capacity else []
    wanted = round(settings.replay_fraction * new / (1 - settings.replay_fraction))
    chosen = _random(settings.seed, turn, 2).permutation(len(kept))[:wanted]
    return [kept[place] for place in sorted(chosen)]


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def divided(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """To train on, and held out. A question is on the same side in every round: by a hash of its tokens."""

    def held(sample: Sample) -> bool:
        digest = hashlib.sha256(repr((seed, sample.prompt.token_ids)).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    sides = [held(sample) for sample in samples]
    return (
        [sample for sample, out in zip(samples, sides, strict=True) if not out],
        [sample for sample, out in zip(samples, sides, strict=True) if out],
    )


def quality(samples: Sequence[Sample], made: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Figures of a model's probabilities on samples with labels; all from 0 to 1, None where there is nothing to tell.

    accuracy (a probability above ½ against a label above ½), auc, calibration_error (10 bins), labels (how many),
    positives (how many of them above ½). Over the questions with several completions: mean (how often a completion is
    right), best_of_n (the one with the highest probability; of a process model, the highest least one of its steps),
    majority_vote (the commonest answer, its last number or else its text), any_right; what is tied is shared.
    """
    flat = np.array([each for own in made for each in own])
    labels = np.array([each for sample in samples for each in sample.labels.rewards])
    positive = labels > 0.5
    figures: dict[str, float | None] = {"labels": float(len(labels)), "positives": float(positive.sum())}
    if len(flat):
        figures["accuracy"] = float(((flat > 0.5) == positive).mean())
        figures["auc"] = auc(flat, positive)
        figures["calibration_error"] = calibration_error(flat, labels)
    together: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        together[sample.prompt.id].append(place)
    questions = [own for own in together.values() if len(own) > 1]
    if not questions:
        return figures
    shares: dict[str, list[float]] = defaultdict(list)
    for own in questions:
        right = np.array([samples[place].right for place in own], dtype=float)
        scores = np.array([min(made[place], default=0.0) for place in own])
        answers = [_answer(samples[place].completion.text) for place in own]
        votes = np.array([answers.count(answer) for answer in answers])
        shares["mean"].append(float(right.mean()))
        shares["best_of_n"].append(float(right[scores == scores.max()].mean()))
        shares["majority_vote"].append(float(right[votes == votes.max()].mean()))
        shares["any_right"].append(float(right.max()))
    return figures | {name: float(np.mean(values)) for name, values in shares.items()}


def _answer(text: str) -> object:
    number = last_number(text)
    return text.strip() if number is None else number


@dataclass(frozen=True)
class RewardModelTrainer:
    """Trains the model of a scorer. `optimizer`: of its weights; `max_grad_norm`: gradients are clipped to this."""

    scorer: RewardModelScorer
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    @property
    def settings(self) -> RewardModel:
        """The recipe's [reward_model]."""
        return self.scorer.settings

    def learn(
        self,
        new: Sequence[Sample],
        history: Sequence[Sample],
        turn: int,
        require_finite: RequireFinite,
        progress: Progress,
        stop: Stop,
    ) -> dict[str, float | None]:
        """Train on new samples and on what is replayed of earlier ones; `turn`: the iteration, from 1. Figures of the
        training, and of the held-out part of the new samples, before and after."""
        training, held = divided(new, self.settings.held_out, self.settings.seed)
        earlier, _ = divided(history, self.settings.held_out, self.settings.seed)
        again = replayed(earlier, len(training), self.settings, turn)
        if not any(sample.labels.ends for sample in training):
            raise RunError(
                f"reward_model: of {len(new)} labelled completions none with a label is left to train on; see "
                "events.jsonl for rules that failed, or write more reward_model.prompts or a smaller held_out"
            )
        before = self.quality(held, progress)
        metrics = fit(self, [*training, *again], turn, require_finite, progress, stop)
        after = self.quality(held, progress)
        return {
            "reward_model/new": float(len(training)),
            "reward_model/replayed": float(len(again)),
            "reward_model/held_out": float(len(held)),
            "reward_model/right": sum(each.right for each in new) / len(new) if new else None,
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
    """Train the scorer's model on the samples, in mini-batches; the metrics of all updates. `done`: how many updates
    were made before; `after` is called with the number of each that is made and its metrics."""
    settings, whole = trainer.settings, Metrics()
    rows = list(minibatches([sample for sample in samples if sample.labels.ends], settings, turn))
    with progress.bar("Training the reward model", len(rows), "updates") as show:
        show(done)
        for number, row in enumerate(rows[done:], start=done + 1):
            stop.check()
            total, norm = trainer.scorer.sizes.fitting(
                "micro_batch_tokens", "training the reward model", partial(_learn_from, trainer, row, require_finite)
            )
            own = Metrics()
            for each in (own, whole):
                each.mean("reward_model/loss", total)
                each.mean("reward_model/gradient_norm", norm)
            after(number, own)
            show(1)
    return whole


def _learn_from(
    trainer: RewardModelTrainer, row: Sequence[Sample], require_finite: RequireFinite, tokens: int
) -> tuple[float, float]:
    """One update on a mini-batch, in micro-batches of so many tokens; see `gruppo.training.optimizer.update`."""
    model = trainer.scorer.model
    batches, loss_of = label_batches(model, row, tokens)
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
    )
