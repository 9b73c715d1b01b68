"""Groups sampled from the current policy and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gruppo.algorithms.filtering import drop, mark_trained, rewards_differ
from gruppo.config.recipe import Recipe
from gruppo.data.mixture import Mixture
from gruppo.engines.base import Engine, SamplingParams
from gruppo.errors import RunError
from gruppo.rollout.episodes import Episodes
from gruppo.rollout.labels import LabelledCompletion
from gruppo.rollout.reward_failures import record_failures
from gruppo.rollout.reward_model import RewardModelScorer
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.scoring import score_groups, scored_groups
from gruppo.rollout.source import Step
from gruppo.rollout.step_labels import StepLabeller
from gruppo.rollout.workers.rewards import RewardPool, Rewards, trainer_state
from gruppo.runs.recorder import Recorder
from gruppo.types import Completion, Group, Prompt
from gruppo.utils.metrics import Metrics
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Audit(Protocol):
    """Checks a share of the rewards with a second grader; see `gruppo.training.reward_audit`."""

    def score(
        self,
        groups: Sequence[Group],
        weights: Mapping[str, float],
        step: int,
        metrics: Metrics,
        advance: Callable[[float], None],
    ) -> list[str]:
        """Score some of the groups again. Returns the reasons of failures."""


@dataclass
class LiveRollouts:
    """See `RolloutSource`.

    `engine`: samples completions; with an environment, through `multi_turn`. `pool`: the reward functions.
    `scorer`: the reward model, if the recipe has one. `weights`: weights of all rewards, by name.
    `folder`: the run folder, in which failed reward calls are saved.
    `save`: saves the run before it stops because rewards failed, and says in words what is saved. The step is not lost:
    a resumed run repeats it. `streamed`: whether groups are scored while others are sampled, by a `pool` on other
    machines.
    """

    recipe: Recipe
    prompts: Mixture
    engine: Engine
    multi_turn: Episodes | None
    pool: Rewards
    scorer: RewardModelScorer | None
    audit: Audit | None
    tokenizer: PreTrainedTokenizerBase
    params: SamplingParams
    weights: Mapping[str, float]
    folder: Path
    recorder: Recorder
    stop: Stop
    save: Callable[[], str]
    streamed: bool

    def collect(self, step: Step) -> list[Group]:
        """See `RolloutSource`. With dynamic sampling, groups whose rewards do not differ are dropped and replaced by
        groups of other prompts, for a limited number of rounds."""
        wanted, rounds = self.recipe.sampling.prompts_per_step, self.recipe.method.dynamic_sampling_rounds
        groups = self._sample_and_score(step, step.cursor, wanted)
        for _ in range(rounds):
            missing = wanted - sum(map(rewards_differ, groups))
            if not missing or not any(any(group.trained) for group in groups):
                break  # enough groups, or a broken reward, for which more completions would not help
            groups += self._sample_and_score(step, step.cursor + len(groups), missing)
        self.engine.sleep()
        if rounds:
            self._drop_equal_rewards(step, groups)
        self._require_rewards(step, groups)
        return groups

    def label(
        self, prompts: Sequence[Prompt], step: int, key: tuple[int, ...]
    ) -> tuple[list[LabelledCompletion], Counter[str]]:
        """See `RolloutSource`."""
        assert self.recipe.reward_model is not None
        labeller = StepLabeller(
            self.engine,
            self.pool,
            self.tokenizer,
            self.params,
            self.recipe.reward_model,
            self.recipe.method.success_threshold,
            self.recorder,
            self.stop,
        )
        labels = labeller.sample(prompts, self.recipe.sampling.group_size, key)
        self.engine.sleep()
        return labels

    def _sample_and_score(self, step: Step, cursor: int, count: int) -> list[Group]:
        """Scored groups of the next `count` prompts after the first `cursor` prompts of the run."""
        prompts, size = self.prompts.draw(cursor, count), self.recipe.sampling.group_size
        streams = [[(self.recipe.run.seed, step.number, cursor + i, j) for j in range(size)] for i in range(count)]
        try:
            if self.streamed and self.multi_turn is None:
                groups = self._score_while_sampling(step, prompts, streams)
            else:
                with step.timer("generate"), self.stop.interruptible():
                    prompts, completions = self.sample(prompts, streams)
                with step.timer("reward"), self.stop.interruptible():
                    groups = self.score(step, cursor, prompts, completions)
        except RunError:  # a replaced worker process cannot load the user's code again
            self.save()
            raise
        if self.recipe.method.credit != "step" and any(reward.steps for group in groups for reward in group.rewards):
            raise RunError(
                f'method.credit = "{self.recipe.method.credit}": a reward scores steps, but this method does not use '
                'step rewards; write method.name = "grpo-process", or use another reward'
            )
        mark_trained(groups, self.recipe.method.mask_truncated)
        return groups

    def _score_while_sampling(
        self, step: Step, prompts: Sequence[Prompt], streams: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[Group]:
        """Sample and score; a group is scored as soon as it is sampled. Results are those of `sample` and `score`."""
        assert isinstance(self.pool, RewardPool)
        with self.pool.begin(prompts, trainer_state(self.recipe, step.number)) as scoring:
            with step.timer("generate"), self.stop.interruptible():
                completions = sample_groups(
                    self.engine,
                    prompts,
                    streams,
                    self.params,
                    self.recorder,
                    self.stop,
                    listener=scoring,
                )
            with step.timer("reward"), self.stop.interruptible():
                return self._judge(
                    step, scored_groups(prompts, completions, scoring.finish, step.metrics, self.recorder, self.stop)
                )

    def sample(
        self, prompts: Sequence[Prompt], streams: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """Sample one completion per random stream for every prompt. With an environment, the returned prompts may end
        with its first observation."""
        if self.multi_turn is None:
            return list(prompts), sample_groups(self.engine, prompts, streams, self.params, self.recorder, self.stop)
        return self.multi_turn.play(self.engine, prompts, streams, self.params, self.recorder, self.stop)

    def score(
        self, step: Step, cursor: int, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[Group]:
        """Score with reward functions, environment and reward model; audit the rewards if the recipe asks for it."""
        weight = self.multi_turn.weight if self.multi_turn else None
        state = trainer_state(self.recipe, step.number)
        groups = score_groups(prompts, completions, self.pool, state, step.metrics, self.recorder, self.stop, weight)
        return self._judge(step, groups)

    def _judge(self, step: Step, groups: list[Group]) -> list[Group]:
        """Add the reward model's scores to groups, and audit them."""
        if self.scorer is not None:
            self.scorer.score(groups)
        if self.audit is not None:
            failed = self.audit.score(groups, self.weights, step.number, step.metrics, lambda _: self.stop.check())
            for failure in failed:
                self.recorder.event("reward_failed", f"audit: {failure}", step.number)
        return groups

    def record_failures(self, step: Step, groups: Sequence[Group]) -> list[str]:
        """Record failed rewards; see `gruppo.rollout.reward_failures.record_failures`."""
        state = trainer_state(self.recipe, step.number)
        return record_failures(self.recorder, self.folder, step.number, groups, self.pool, state)

    def _drop_equal_rewards(self, step: Step, groups: Sequence[Group]) -> None:
        wanted, rounds = self.recipe.sampling.prompts_per_step, self.recipe.method.dynamic_sampling_rounds
        for group in groups:
            if not rewards_differ(group):
                drop(
                    group,
                    "dropped: its rewards do not differ; other prompts were sampled (method.dynamic_sampling_rounds)",
                )
        if missing := wanted - sum(map(rewards_differ, groups)):
            unknown = sum(not any(reward.total is not None for reward in group.rewards) for group in groups)
            message = f"{missing} of {wanted} groups have equal rewards after up to {rounds} dynamic sampling rounds"
            detail = f"{len(groups)} were sampled, {unknown} of them are excluded; the step continues without them"
            self.recorder.event("dynamic_sampling_exhausted", f"{message} ({detail})", step.number)

    def _require_rewards(self, step: Step, groups: Sequence[Group]) -> None:
        """Save the run and raise RunError if rewards failed on more of a step's completions than the recipe allows."""
        rewards = [reward for group in groups for reward in group.rewards]
        failed = Counter(failure for reward in rewards for failure in reward.failures.items())
        count, limit = sum(bool(reward.failures) for reward in rewards), self.recipe.reward.failure_limit
        if count <= limit * len(rewards):
            return
        saved = self.save()
        files = self.record_failures(step, groups)  # after the checkpoint, because the step will be repeated
        ((name, why), most), *_ = failed.most_common(1)
        where = f"; rerun the call with: gruppo rerun-reward {self.folder / files[0]}" if files else ""
        raise RunError(
            f"step {step.number}: {count} of {len(rewards)} completions are excluded because a reward failed, more "
            f"than reward.failure_limit = {limit:g} allows; {most} of them because of {name}: {why}{where}. This step "
            f"was not trained on, and {saved}: fix the reward and continue with --resume"
        )
