"""A reward model at work in a run: it scores the completions of steps, and learns between iterations, with replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from gruppo.config.recipe import RewardModel
from gruppo.errors import RunError
from gruppo.models.reward_model import (
    Sample,
    divided,
    label_batches,
    last_token,
    minibatches,
    probabilities,
    quality,
    replayed,
    with_scores,
)
from gruppo.models.value_head import ScalarModel
from gruppo.rewards.steps import checked_ends, find_split, step_tokens
from gruppo.training.oom_retry import Sizes
from gruppo.training.policy_trainer import Require, update
from gruppo.types import Completion, Group, Metrics, Steps
from gruppo.utils.progress import Reporter
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Judge:
    """`optimizer`: of the model's weights, where it is trained."""

    model: ScalarModel
    optimizer: torch.optim.Optimizer | None
    settings: RewardModel
    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes
    max_grad_norm: float

    def score(self, groups: Sequence[Group]) -> None:
        """Put the model's judgement into the rewards; a completion whose steps cannot be told abstains."""
        places = [(group, number) for group in groups for number in range(len(group.completions))]
        asked = []
        for group, number in places:
            completion = group.completions[number]
            try:
                ends = self._ends(completion)
            except RunError as error:
                rewards, ends = list(group.rewards), ()
                rewards[number] = replace(rewards[number], total=None, failure=str(error))
                group.rewards = rewards
            asked.append(Sample(group.prompt, completion, False, Steps((0.0,) * len(ends), ends)))
        made = self._probabilities(asked, "judging by the reward model")
        scored = [
            with_scores(group.rewards[number], self.settings.kind, sample.labels.ends, own, self.settings.weight)
            for (group, number), sample, own in zip(places, asked, made, strict=True)
        ]
        following = iter(scored)
        for group in groups:
            group.rewards = [next(following) for _ in group.completions]

    def _ends(self, completion: Completion) -> tuple[int, ...]:
        if self.settings.kind == "outcome":
            return last_token(completion)
        ends = checked_ends(find_split(self.settings.split), completion.text)
        return tuple(end for end, _ in step_tokens(completion, ends, self.tokenizer))

    def learn(
        self,
        new: Sequence[Sample],
        history: Sequence[Sample],
        turn: int,
        require_finite: Require,
        reporter: Reporter,
        stop: Stop,
    ) -> dict[str, float | None]:
        """Train on new samples and on what is replayed of earlier ones; `turn`: the iteration, from 1. Figures of the
        training, and of the held-out part of the new samples, before and after."""
        assert self.optimizer is not None
        training, held = divided(new, self.settings.held_out, self.settings.seed)
        earlier, _ = divided(history, self.settings.held_out, self.settings.seed)
        again = replayed(earlier, len(training), self.settings, turn)
        if not any(sample.labels.ends for sample in training):
            raise RunError(
                f"reward_model: of {len(new)} labelled completions none with a label is left to train on; see "
                "events.jsonl for rules that failed, or write more reward_model.prompts or a smaller held_out"
            )
        before = self.quality(held, reporter)
        metrics = fit(self, [*training, *again], turn, require_finite, reporter, stop)
        after = self.quality(held, reporter)
        return {
            "reward_model/new": float(len(training)),
            "reward_model/replayed": float(len(again)),
            "reward_model/held_out": float(len(held)),
            "reward_model/right": sum(each.right for each in new) / len(new) if new else None,
            **metrics.reduce(),
            **{f"reward_model/before/{name}": value for name, value in before.items()},
            **{f"reward_model/after/{name}": value for name, value in after.items()},
        }

    def quality(self, samples: Sequence[Sample], reporter: Reporter) -> dict[str, float | None]:
        """See `gruppo.models.reward_model.quality`."""
        with reporter.progress("Measuring the reward model", None, ""):
            return quality(samples, self._probabilities(samples, "measuring the reward model"))

    def _probabilities(self, samples: Sequence[Sample], during: str) -> list[tuple[float, ...]]:
        """See `gruppo.models.reward_model.probabilities`. Raises RunError where one is not finite."""
        model = self.model

        def attempt(tokens: int) -> list[tuple[float, ...]]:
            return probabilities(model, samples, tokens, model.policy.device)

        made = self.sizes.fitting("micro_batch_tokens", during, attempt)
        odd = [sample.prompt.id for sample, own in zip(samples, made, strict=True) if not all(map(math.isfinite, own))]
        if odd:
            raise RunError(
                f"the reward model's probability of a completion of {odd[0]} is not finite: its weights have diverged; "
                "begin again with a lower reward_model.learning_rate"
            )
        return made


def fit(
    judge: Judge,
    samples: Sequence[Sample],
    turn: int,
    require_finite: Require,
    reporter: Reporter,
    stop: Stop,
    done: int = 0,
    after: Callable[[int, Metrics], None] = lambda number, metrics: None,
) -> Metrics:
    """Train the judge's model on the samples, in mini-batches; the metrics of all updates. `done`: how many updates
    were made before; `after` is called with the number of each that is made and its metrics."""
    assert judge.optimizer is not None
    settings, whole = judge.settings, Metrics()
    rows = list(minibatches([sample for sample in samples if sample.labels.ends], settings, turn))
    with reporter.progress("Training the reward model", len(rows), "updates") as show:
        show(done)
        for number, row in enumerate(rows[done:], start=done + 1):
            stop.check()
            total, norm = judge.sizes.fitting(
                "micro_batch_tokens", "training the reward model", partial(_learn_from, judge, row, require_finite)
            )
            own = Metrics()
            for each in (own, whole):
                each.mean("reward_model/loss", total)
                each.mean("reward_model/gradient_norm", norm)
            after(number, own)
            show(1)
    return whole


def _learn_from(judge: Judge, row: Sequence[Sample], require_finite: Require, tokens: int) -> tuple[float, float]:
    """One update on a mini-batch, in micro-batches of so many tokens; see `gruppo.training.policy_trainer.update`."""
    assert judge.optimizer is not None
    model = judge.model
    batches, loss_of = label_batches(model, row, tokens)
    return update(
        batches,
        loss_of,
        model.policy,
        model.module,
        judge.optimizer,
        judge.settings.learning_rate,
        judge.max_grad_norm,
        require_finite,
        lambda _: None,
    )
