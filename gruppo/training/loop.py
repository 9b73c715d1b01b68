"""Algorithm 1 of DeepSeekMath.

    for each iteration: π_ref ← π_θ; train the reward model, if there is one, on new samples labelled by rule
      for each step: draw questions; sample G completions of each from π_old; score them; compute advantages;
                     for each of μ inner updates: one step of AdamW on the objective

The paper trains the reward model at the end of an iteration; here it learns at the start of the next, and before the
first, so that no model is trained that nothing follows.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gruppo.algorithms.credit import (
    assign_advantages,
    batch_loss,
    drop,
    keep_logprobs,
    mark_trained,
    put_logprobs,
    rewards_differ,
    score_batches,
    select,
    token_weights,
)
from gruppo.config.recipe import Optimizer
from gruppo.errors import RunError, first_line, out_of_memory
from gruppo.evaluation.metrics import figure_metrics
from gruppo.evaluation.sets import Evaluation, hold
from gruppo.models.lora import save_adapter
from gruppo.models.policy import LanguageModel, named_weights, save_model, save_weights, tensors_sha256
from gruppo.models.reward_model import NAME, save_reward_model
from gruppo.models.value_head import ScalarModel
from gruppo.rollout.environments.client import NAME as ENVIRONMENT
from gruppo.rollout.recorded import Recorded
from gruppo.rollout.reward_failures import failures_of, keep_call
from gruppo.rollout.sampling import describe_groups, given_groups, sample_groups, score_groups
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.runs.atomic import WriteError
from gruppo.runs.reading import reading
from gruppo.runs.tables import EVALUATIONS, LABELS, ROLLOUTS, rollout_rows
from gruppo.runs.warnings import Watch
from gruppo.training.callbacks import Callbacks
from gruppo.training.checkpoint import (
    Others,
    State,
    drop_old,
    file_sha256,
    link_file,
    load_state,
    load_tensors,
    newest_checkpoint,
    put_weights,
    save_checkpoint,
)
from gruppo.training.nonfinite import keep_batches, not_finite
from gruppo.training.oom_retry import Halving
from gruppo.training.packing import Batch, TokenWeights, pack
from gruppo.training.policy_trainer import update
from gruppo.training.reward_audit import Auditor
from gruppo.training.reward_model import Judge
from gruppo.training.setup import Prepared
from gruppo.training.step_labels import Labeller, label_rows, read_labels
from gruppo.training.value_model import critic_loss, score_values
from gruppo.types import Completion, Group, Metrics, Prompt
from gruppo.utils.progress import Reporter
from gruppo.utils.signals import Interrupted, Stop
from gruppo.utils.system import peak_memory, release_memory

BFLOAT16_DRIFT, FLOAT32_DRIFT = 0.05, 1e-4  # nats a token on average


def run(prepared: Prepared, reporter: Reporter, stop: Stop, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Run what was prepared, from wherever its folder stands; returns the content of summary.json."""
    return _Run(prepared, reporter, stop, callbacks or Callbacks()).go()


def redo(prepared: Prepared, reporter: Reporter, stop: Stop, recorded: Recorded, last: int) -> int:
    """Make the steps up to `last` again, from the newest checkpoint that the folder holds and from what was recorded;
    nothing is sampled, evaluated or saved. The step that it began after."""
    run = _Run(prepared, reporter, stop, Callbacks(), recorded)
    return run.redo(last, recorded)


class _Run:
    """A run on its way: what was prepared, and where it stands. `recorded`: what its steps are made again from."""

    def __init__(
        self,
        prepared: Prepared,
        reporter: Reporter,
        stop: Stop,
        callbacks: Callbacks,
        recorded: Recorded | None = None,
    ) -> None:
        self.recorded = recorded
        self.parts, self.recipe, self.run = prepared, prepared.recipe, prepared.run
        self.reporter, self.stop, self.callbacks = reporter, stop, callbacks
        self.state = State()
        self.saved: tuple[int, bool, int] | None = None
        self.lengths: dict[str, int] = {}  # of the append-only files, where nothing was half done
        self.learning = False  # the reward model, which is half trained then
        self.judge = None
        if prepared.reward_model is not None and self.recipe.reward_model is not None:
            self.judge = Judge(
                prepared.reward_model,
                prepared.reward_optimizer,
                self.recipe.reward_model,
                prepared.policy.tokenizer,
                prepared.sizes,
                self.recipe.optimizer.max_grad_norm,
            )
        prepared.sizes.told = self._note_halving
        self.watch = self._watch()
        self.auditor = None
        if prepared.audit is not None and self.recipe.audit is not None:
            self.auditor = Auditor(prepared.audit, self.recipe.audit, self.recipe.run.seed)

    def go(self) -> dict[str, Any]:
        """From wherever the folder stands to the end, an interruption or a failure; the summary."""
        with self.stop.anywhere():
            self._restore()
        outcome = "failed"
        try:
            with self.reporter.progress("Training", self.recipe.run.steps, "steps") as advance:
                advance(self.state.step)
                self._steps(advance)
            outcome = "done" if self.state.step == self.recipe.run.steps else "stopped"
        except Interrupted:
            if not self.learning:  # else the checkpoint from before is where to go on
                self.run.cut_back(self.lengths, self.state.step)
                self._save_once()
            outcome = "interrupted"
        except Exception as error:
            if self.callbacks.failed:  # which they do where nothing is half done
                self._save_once()
            elif out_of_memory(error):
                message = f"memory ran out ({first_line(error)}); free some, and resume from the last checkpoint"
                raise RunError(message) from error
            raise
        finally:
            summary = self._summary(outcome)
            with suppress(*[WriteError] if outcome == "failed" else []):  # the failure goes first
                self.run.write_json("summary.json", summary)
        return summary

    def redo(self, last: int, recorded: Recorded) -> int:
        """See `redo`."""
        self._restore()
        begun, sizes = self.state.step, self.parts.sizes
        with self.reporter.progress("Making steps again", last - begun, "steps") as advance:
            while self.state.step < last:
                self.stop.check()
                due, step = self._iteration_due(), self.state.step
                now = sizes.micro_batch_tokens
                sizes.micro_batch_tokens = recorded.micro_batch_tokens(step if due else step + 1, due, now)
                if due:
                    self._begin_iteration()
                else:
                    self._step()
                    advance(1)
        return begun

    def _steps(self, advance: Callable[[float], None]) -> None:
        """Algorithm 1. At the top of the loop nothing is half done: that is where state is saved."""
        while True:
            self.lengths = self.run.lengths()
            if self._evaluation_due():
                self._evaluate()
            last = self._at_end
            if last or (self.state.step and self.state.step % self.recipe.run.checkpoint_every == 0):
                self._save_once()
            if last:
                return
            if self.callbacks.stopped:  # by the checkpoint just made: make it again, as the last one, with the result
                self.saved = None
                continue
            self.stop.check()
            if self._iteration_due():
                self._begin_iteration()
                continue
            self._step()
            advance(1)

    @property
    def _at_end(self) -> bool:
        return self.state.step == self.recipe.run.steps or self.callbacks.stopped

    def _save_once(self) -> None:
        """Make a checkpoint of where the run stands, after the result if this is its end, unless there is one."""
        where = self.state.step, self.state.evaluated, self.state.iteration
        if self.saved == where or self.recorded is not None:
            return
        if self._at_end:
            self._save_result()
        self._note_memory()
        with self.reporter.progress("Saving", None, ""):
            reference = [self._reference_file] if self._reference_file.is_file() and self.state.iteration > 1 else []
            policy, optimizer = self.parts.policy.model, self.parts.optimizer
            path = save_checkpoint(self.run, policy, optimizer, self.state, self._others(), reference)
        self.saved = where
        self.callbacks.tell("on_checkpoint", self.state.step, path)

    def _others(self) -> Others:
        """What is trained beside the policy."""
        parts = self.parts
        pairs = {
            "critic": (parts.critic, parts.critic_optimizer),
            "reward_model": (parts.reward_model, parts.reward_optimizer),
        }
        return {name: (model.module, own) for name, (model, own) in pairs.items() if model and own}

    def _save_result(self) -> None:
        with self.run.building("model") as folder:
            save_model(self.parts.policy, folder)
        if self.judge is not None and self.judge.optimizer is not None:
            with self.run.building("reward_model") as folder:
                save_reward_model(self.judge.model, self.judge.settings.kind, folder)
        if self.recipe.model.lora is not None:
            with self.run.building("adapter") as folder:
                save_adapter(self.parts.policy.model, folder, self.recipe.model.name)

    def _note_memory(self) -> None:
        peak = peak_memory(self.parts.policy.device)
        self.state.peak_memory_bytes = max(self.state.peak_memory_bytes, peak)

    def _iteration_due(self) -> bool:
        length = self.recipe.run.steps // self.recipe.run.iterations
        return not self._at_end and self.state.iteration <= self.state.step // length

    def _begin_iteration(self) -> None:
        """π_ref ← π_θ, and what the reward model learns from new samples of the policy; a checkpoint before and after,
        unless nothing is there to be lost."""
        parts, state, clock, number = self.parts, self.state, _Clock(), self.state.iteration + 1
        learns = self.judge is not None and self.judge.optimizer is not None
        if number == 1 and not learns:
            state.iteration = number
            return
        if state.step:
            self._save_once()
            if self.callbacks.stopped:
                self.saved = None  # made again, as the last one, with the result
                return
        if number > 1 and parts.reference is not None:
            with self.run.building(self._reference_file.parent.name) as folder:
                save_weights(parts.policy.weights(), folder, self._reference_file.name)
            parts.reference = None  # freed before the new one is made
            parts.reference = parts.policy.frozen_copy()
        figures: dict[str, float | None] = {}
        if self.judge is not None and learns:
            self.learning = True
            with clock("reward_model"), self.stop.anywhere():  # a round that was stopped is begun again
                figures = self._train_reward_model(self.judge, number)
            self.learning = False
        state.iteration = number
        state.train_seconds += clock.total
        times = {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
        size = {"memory/micro_batch_tokens": parts.sizes.micro_batch_tokens}
        self._note({"step": state.step, "iteration": number, **figures, **times, **size})
        self._save_once()
        if self.callbacks.stopped:
            self.saved = None

    @property
    def _reference_file(self) -> Path:
        """The weights of a reference that is not the start model."""
        return self.run.path / "reference" / "reference.safetensors"

    def _train_reward_model(self, judge: Judge, number: int) -> dict[str, float | None]:
        """Sample, label by rule, and train on that and on a share of what earlier iterations labelled."""
        parts, recipe, state = self.parts, self.recipe, self.state
        assert parts.pool is not None
        prompts = parts.prompts.draw(state.cursor, judge.settings.prompts)
        labeller = Labeller(
            parts.sampler,
            parts.pool,
            parts.policy.tokenizer,
            parts.sampling,
            judge.settings,
            recipe.method.right,
            self.reporter,
            self.stop,
        )
        key = recipe.run.seed, 0, state.cursor
        if self.recorded is None:
            labels, failures = labeller.sample(prompts, recipe.sampling.group_size, key)
        else:
            labels, failures = self.recorded.labels(state.step), Counter()
        for failure, count in failures.items():
            self.run.event("abstention", failure, state.step, completions=count)
        if failures:
            total = sum(failures.values())
            self.reporter.note(f"Step {state.step}: {total} verdicts for labels failed; see events.jsonl")
        earlier = [self.run.path / "labels" / name for name in sorted(state.labels)]
        for file in earlier:
            if not file.is_file() or file_sha256(file) != state.labels[file.name]:
                raise RunError(f"{file}: is not what this run wrote, and its reward model learns from it; put it back")
        history = [each.sample(judge.settings) for each in read_labels(earlier)]
        made = self.run.table("labels", state.step, label_rows(labels), LABELS)
        state.cursor += len(prompts)
        state.labels[made.name] = file_sha256(made)

        def require(value: float, what: str, batches: Sequence[Batch]) -> None:
            self._require_finite(value, f"reward model's {what}", batches, 0, "reward_model.learning_rate")

        new = [each.sample(judge.settings) for each in labels]
        return judge.learn(new, history, number, require, self.reporter, self.stop)

    def _step(self) -> None:
        parts, recipe, state = self.parts, self.recipe, self.state
        metrics, clock, step = Metrics(), _Clock(), state.step + 1
        groups = self._explore(step, metrics, clock)
        if self.recorded is None:
            self._require_rewards(step, groups)
        select(groups, recipe.method)
        if recipe.method.needs_scores:
            with clock("score"):
                self._score(groups, metrics)
        if parts.critic is not None:
            with clock("score"):
                self._score_values(parts.critic, groups)
        assign_advantages(groups, recipe.method, metrics, self._weights(), recipe.critic)
        packed = self._packed(groups, recipe.method.kl_in_loss or parts.critic is not None)
        rate = learning_rate(recipe.optimizer, state.step, recipe.run.steps)
        release_memory()  # what one phase has freed would lie in pieces that the next one cannot use
        with clock("update"):
            for number in range(recipe.method.inner_updates if packed.batches else 0):
                self._update(packed, rate, metrics, number)
                self._update_critic(packed, rate, metrics, number)
        with clock("load_weights"):
            parts.engine.load_weights(parts.policy, step)
        release_memory()
        keep_logprobs(groups, packed.batches)
        values = self._write_step(step, groups, rate, metrics, clock, bool(packed.batches))
        state.step, state.cursor, state.evaluated = step, state.cursor + len(groups), False
        self.callbacks.tell("on_step", step, values, groups)

    def _weights(self) -> dict[str, float]:
        """Of whatever judges, by name."""
        pool = self.parts.pool
        weights = dict(zip(pool.names, pool.weights, strict=True)) if pool else {}
        episodes = self.parts.episodes
        if episodes is not None and episodes.weight is not None:
            weights[ENVIRONMENT] = episodes.weight
        return weights | ({NAME: self.judge.settings.weight} if self.judge else {})

    def _explore(self, step: int, metrics: Metrics, clock: _Clock) -> list[Group]:
        """The step's groups, sampled from the policy and scored. Where the method refills, groups whose rewards do not
        differ are dropped, and as many other questions are drawn, for so many rounds at the most."""
        wanted, rounds = self.recipe.sampling.prompts_per_step, self.recipe.method.refill_rounds
        groups = self._sample(step, self.state.cursor, wanted, metrics, clock)
        if not rounds:
            return groups
        for _ in range(rounds):
            lacking = wanted - sum(map(rewards_differ, groups))
            if not lacking or not any(any(group.trained) for group in groups):
                break  # enough, or a reward that is broken, for which more completions would not help
            groups += self._sample(step, self.state.cursor + len(groups), lacking, metrics, clock)
        for group in groups:
            if not rewards_differ(group):
                drop(group, "dropped, as its rewards do not differ; other questions were drawn (method.refill_rounds)")
        if lacking := wanted - sum(map(rewards_differ, groups)):
            unknown = sum(not any(reward.total is not None for reward in group.rewards) for group in groups)
            message = f"refilling up to {rounds} times left {lacking} of {wanted} groups without rewards that differ"
            detail = f"{len(groups)} were sampled, {unknown} of them abstained; the step goes on without them"
            self.run.event("refill_exhausted", f"{message} ({detail})", step)
        return groups

    def _sample(self, step: int, cursor: int, count: int, metrics: Metrics, clock: _Clock) -> list[Group]:
        """Groups of the next questions after the first `cursor` draws of the run."""
        parts, recipe = self.parts, self.recipe
        prompts = parts.prompts.draw(cursor, count)
        if parts.pool is None:
            groups = given_groups(prompts, parts.given)
            mark_trained(groups, recipe.method.mask_truncated)
            return groups
        size = recipe.sampling.group_size
        streams = [[(recipe.run.seed, step, cursor + i, j) for j in range(size)] for i in range(count)]
        with clock("generate"), self.stop.anywhere():
            if parts.episodes is None:
                sampled = sample_groups(parts.sampler, prompts, streams, parts.sampling, self.reporter, self.stop)
            elif self.recorded is not None:
                prompts, sampled = self.recorded.played(prompts, streams)
            else:
                prompts, sampled = parts.episodes.play(
                    parts.sampler, prompts, streams, parts.sampling, self.reporter, self.stop
                )
        score = partial(self._judge, step, prompts, sampled, parts.pool, metrics)
        with clock("reward"), self.stop.anywhere():
            recorded = self.recorded
            groups = score() if recorded is None else recorded.rewarded(step, cursor, prompts, sampled, score)
        if recipe.method.credit != "step" and any(reward.steps for group in groups for reward in group.rewards):
            raise RunError(
                f'method.credit = "{recipe.method.credit}": a reward judges steps, which it would not learn from; '
                'write method.name = "grpo-process", or take another reward'
            )
        mark_trained(groups, recipe.method.mask_truncated)
        return groups

    def _judge(
        self,
        step: int,
        prompts: Sequence[Prompt],
        sampled: Sequence[Sequence[Completion]],
        pool: RewardPool,
        metrics: Metrics,
    ) -> list[Group]:
        """Groups with the rewards that functions and the reward model give them; audited, where the recipe asks."""
        try:
            weight = self.parts.episodes.weight if self.parts.episodes else None
            groups = score_groups(prompts, sampled, pool, self._told(), metrics, self.reporter, self.stop, weight)
        except RunError:  # a process that was replaced cannot load the functions again
            self._save_once()
            raise
        if self.judge is not None:
            self.judge.score(groups)
        if self.auditor is not None:
            failed = self.auditor.judge(groups, self._weights(), step, metrics, lambda _: self.stop.check())
            for failure in failed:
                self.run.event("abstention", f"audit: {failure}", step)
        return groups

    def _packed(self, groups: Sequence[Group], with_kl: bool) -> _Packed:
        weights = token_weights(self.recipe.method, self.recipe.sampling.max_tokens)
        return _Packed(groups, weights, self.parts.policy, with_kl, self.parts.sizes.micro_batch_tokens)

    def _score(self, groups: Sequence[Group], metrics: Metrics) -> None:
        """π_old and π_ref of the trained completions, for a KL in the reward, or for pairs."""
        policy, reference, packed = self.parts.policy, self.parts.reference, self._packed(groups, with_kl=True)
        assert reference is not None

        def attempt(tokens: int) -> Sequence[Batch]:
            batches = packed.at(tokens)
            with metrics.all_or_nothing():
                score_batches(policy, reference, batches, self.recipe.sampling.temperature, metrics)
            return batches

        batches = self.parts.sizes.fitting("micro_batch_tokens", "scoring", attempt)
        for batch in batches:
            if odd := not_finite(batch):
                self._require_finite(math.nan, next(iter(odd)), [batch], 0)
        keep_logprobs(groups, batches)

    def _score_values(self, critic: ScalarModel, groups: Sequence[Group]) -> None:
        """The value model's numbers for the trained completions."""

        def attempt(tokens: int) -> None:
            score_values(critic, groups, tokens, self.parts.policy.device)

        self.parts.sizes.fitting("micro_batch_tokens", "scoring", attempt)

    def _update(self, packed: _Packed, rate: float, metrics: Metrics, number: int) -> None:
        """One optimizer step on the whole of the step's completions; the loss is a sum over micro-batches."""
        parts, recipe = self.parts, self.recipe

        def loss(batch: Batch) -> torch.Tensor:
            temperature = recipe.sampling.temperature
            return batch_loss(parts.policy, parts.reference, batch, recipe.method, temperature, metrics)

        learner = _Learner(parts.policy, parts.policy.model, parts.optimizer, loss, rate)
        total, norm = self._learn(packed, learner, metrics, number)
        packed.learned = True
        metrics.mean("loss/total", total)
        metrics.mean("optimizer/gradient_norm", norm)
        metrics.mean("optimizer/clipped", norm > recipe.optimizer.max_grad_norm)

    def _update_critic(self, packed: _Packed, rate: float, metrics: Metrics, number: int) -> None:
        """The same of the value model, if there is one; its learning rate follows the policy's schedule."""
        critic, optimizer, settings = self.parts.critic, self.parts.critic_optimizer, self.recipe.critic
        if critic is None or optimizer is None:
            return
        share = rate / self.recipe.optimizer.learning_rate if self.recipe.optimizer.learning_rate else 1.0

        def loss(batch: Batch) -> torch.Tensor:
            return critic_loss(critic, batch, settings, metrics)

        learner = _Learner(critic.policy, critic.module, optimizer, loss, share * settings.learning_rate)
        total, norm = self._learn(packed, learner, metrics, number, "value model's ", "critic.learning_rate")
        metrics.mean("value/loss", total)
        metrics.mean("value/gradient_norm", norm)

    def _learn(
        self,
        packed: _Packed,
        learner: _Learner,
        metrics: Metrics,
        number: int,
        whose: str = "",
        field: str = "optimizer.learning_rate",
    ) -> tuple[float, float]:
        """See `gruppo.training.policy_trainer.update`, under a progress bar. Where memory runs out the update is made again, in smaller
        micro-batches, as if it had not been tried."""

        def require(value: float, what: str, own: Sequence[Batch]) -> None:
            self._require_finite(value, whose + what, own, number, field)

        def attempt(tokens: int) -> tuple[float, float]:
            batches, most = packed.at(tokens), self.recipe.optimizer.max_grad_norm
            with self.reporter.progress("Updating", len(batches), "batches") as advance, metrics.all_or_nothing():
                return update(
                    batches,
                    learner.loss_of,
                    learner.computed_by,
                    learner.module,
                    learner.optimizer,
                    learner.rate,
                    most,
                    require,
                    advance,
                )

        return self.parts.sizes.fitting("micro_batch_tokens", "updating", attempt)

    def _note_halving(self, made: Halving) -> None:
        """Write a size that memory has made smaller down where sizes are, so that a resume keeps it."""
        held = self.run.read_json("environment.json") or {}
        halvings = [*held.get("halvings", []), {"step": self.state.step + 1, **asdict(made)}]
        chosen = {**held.get("chosen", {}), made.size: made.after}
        self.run.write_json("environment.json", {**held, "chosen": chosen, "halvings": halvings})
        self.run.event("memory", str(made), self.state.step + 1, **asdict(made))
        self.reporter.note(f"Step {self.state.step + 1}: {made}")

    def _require_finite(
        self,
        value: float,
        what: str,
        batches: Sequence[Batch],
        update: int,
        field: str = "optimizer.learning_rate",
    ) -> None:
        """Stop before the optimizer where a number is not finite, keeping the batches for inspection."""
        if math.isfinite(value):
            return
        step = self.state.step + 1
        where = f"step {step}" + (f", inner update {update + 1}" if self.recipe.method.inner_updates > 1 else "")
        facts = {"update": update + 1, "what": what, "value": str(value), "micro_batches": len(batches)}
        path = keep_batches(self.run, step, facts, batches, self.parts.policy.tokenizer)
        odd = sorted({name for batch in batches for name in not_finite(batch)})
        inside = f"; not finite in it: {', '.join(odd)}" if odd else ""
        message = f"the {what} of {where} is {value}; this update was not made, and its batch is in {path}{inside}"
        self.run.event("nonfinite", message, step, file=path.name)
        raise RunError(f"{message}; look at the batch, and begin again with a lower {field}")

    def _write_step(
        self, step: int, groups: list[Group], rate: float, metrics: Metrics, clock: _Clock, updated: bool
    ) -> dict[str, Any]:
        parts = self.parts
        describe_groups(groups, metrics, by_task=len(parts.prompts.parts) > 1)
        tokens = sum(sum(c.mask) for group in groups for c in group.completions)
        metrics.mean("optimizer/learning_rate", rate)
        metrics.maximum("memory/peak_bytes", peak_memory(parts.policy.device))
        metrics.maximum("memory/micro_batch_tokens", parts.sizes.micro_batch_tokens)
        self._warn(step, groups, updated)
        with clock("write"):
            self.run.table("rollouts", step, rollout_rows(step, groups, parts.policy.tokenizer), ROLLOUTS)
        self.state.train_seconds += clock.total
        for name, seconds in clock.seconds.items():
            metrics.mean(f"time/{name}", seconds)
        metrics.mean("time/step", clock.total)
        if "generate" in clock.seconds:
            metrics.mean("time/tokens_per_second", tokens, clock.seconds["generate"])
        values = {"step": step, **metrics.reduce()}
        self._note(values)
        alarm = self.auditor and self.auditor.alarm(values)
        if alarm:
            self.run.event("audit", alarm, step)
            self.reporter.note(f"Step {step}: {alarm}")
        return values

    def _tell_failures(self, step: int, groups: Sequence[Group]) -> list[str]:
        """An event for each failure of a reward on a group, with a file that repeats the call; the files' names."""
        files = []
        for failure in failures_of(groups):
            assert self.parts.pool is not None
            file = None
            if failure.name in self.parts.pool.names:  # an environment's call cannot be repeated alone
                file = keep_call(self.run.path, step, failure, self.parts.pool, self._told())
            files += [] if file is None else [file]
            told = {"reward": failure.name, "completions": failure.completions, "file": file}
            message = f"{failure.name}: {failure.why}"
            self.run.event("abstention", message, step, prompt_id=failure.group.prompt.id, **told)
        for group in groups:  # of the reward model
            for why, count in Counter(each.failure for each in group.rewards if not each.failures).items():
                if why:
                    self.run.event("abstention", why, step, prompt_id=group.prompt.id, completions=count)
        return files

    def _require_rewards(self, step: int, groups: Sequence[Group]) -> None:
        """Stop, with everything saved, where rewards failed on more of a step's completions than the recipe allows."""
        rewards = [reward for group in groups for reward in group.rewards]
        failed = Counter(failure for reward in rewards for failure in reward.failures.items())
        count, limit = sum(bool(reward.failures) for reward in rewards), self.recipe.reward.failure_limit
        if count <= limit * len(rewards):
            return
        self._save_once()
        files = self._tell_failures(step, groups)  # after the checkpoint, as the step will be made again
        ((name, why), most), *_ = failed.most_common(1)
        where = f"; see the call by: gruppo repeat {self.run.path / files[0]}" if files else ""
        raise RunError(
            f"step {step}: {count} of {len(rewards)} completions abstain because a reward failed, more than "
            f"reward.failure_limit = {limit:g} allows; {most} of them by {name}: {why}{where}. Nothing was trained on "
            "this step and everything before it is saved: mend the reward, and go on with --resume"
        )

    def _told(self) -> dict[str, int]:
        """What rewards know of the run, as trainer_state."""
        steps, most = self.recipe.run.steps, self.recipe.sampling.max_tokens
        return {"global_step": self.state.step, "max_steps": steps, "max_tokens": most}

    def _note(self, values: Mapping[str, Any]) -> None:
        """Write a line of metrics, and warn of what it gives reason to."""
        self.run.metric(values)
        self.reporter.step(values)
        for notice in self.watch.see(values):
            state, link = "passed" if notice.passed else "begins", notice.link
            details = {"warning": notice.name, "state": state, "evidence": notice.evidence, "link": link}
            self.run.event("warning", notice.message, notice.step, **details)
            title = notice.name.replace("_", " ")
            told = " has passed" if notice.passed else f": {notice.message}; see {link}"
            self.reporter.note(f"Step {notice.step}: warning ({title}){told}")

    def _watch(self) -> Watch:
        """Nothing seen yet. Rounding decides by how much engine and trainer may differ; see docs/metrics.md."""
        return Watch(self._weights(), BFLOAT16_DRIFT if self.parts.policy.dtype == torch.bfloat16 else FLOAT32_DRIFT)

    def _warn(self, step: int, groups: Sequence[Group], updated: bool) -> None:
        """Events for abstentions and for steps that teach nothing."""
        self._tell_failures(step, groups)
        failed = sum(reward.failure is not None for group in groups for reward in group.rewards)
        if failed:
            self.reporter.note(f"Step {step}: {failed} completions abstain because a reward failed; see events.jsonl")
        if not any(group.has_signal for group in groups):
            reasons = sorted({group.skipped for group in groups if group.skipped})
            only = "only the KL term moves the policy" if updated else "the policy is not updated"
            message = f"no group of this step carries a signal ({'; '.join(reasons)}), so {only}"
            self.run.event("no_signal", message, step)
            self.reporter.note(f"Step {step}: {message}")

    def _evaluation_due(self) -> bool:
        return not self.state.evaluated and any(exam.due(self.state.step, self._at_end) for exam in self.parts.exams)

    def _evaluate(self) -> None:
        """Hold the exams that are due: a table of all their answers, and a line of their figures."""
        parts, state, start = self.parts, self.state, time.monotonic()
        due = [exam for exam in parts.exams if exam.due(state.step, self._at_end)]
        with self.stop.anywhere():
            sample = sample_groups if parts.episodes is None else parts.episodes.sample
            seed = self.recipe.run.seed
            outcomes = [hold(exam, parts.engine, seed, self.reporter, self.stop, sample) for exam in due]
        rows = [outcome.rows() for outcome in outcomes]
        self.run.table("evaluations", state.step, list(chain(*rows)), EVALUATIONS)
        values: dict[str, Any] = {"step": state.step}
        figures = [outcome.figures() for outcome in outcomes]
        for outcome, found in zip(outcomes, figures, strict=True):
            name = outcome.exam.name
            if name:
                state.benchmarks.setdefault(str(state.step), {})[name] = found
            else:
                state.evaluations[str(state.step)] = found
            values |= figure_metrics(f"eval/{name}/" if name else "eval/", found)
            self._tell_disagreements(outcome)
        values["time/evaluate"] = time.monotonic() - start
        self._note(values)
        state.evaluated = True
        for outcome, found, own in zip(outcomes, figures, rows, strict=True):
            self.callbacks.tell("on_evaluation", state.step, {"exam": outcome.exam.name, **found}, own)

    def _tell_disagreements(self, outcome: Evaluation) -> None:
        """An event for the answers of an exam on which rules of extraction disagree."""
        pairs = zip(outcome.exam.prompts, outcome.verdicts, strict=True)
        asked = [prompt.id for prompt, own in pairs if any(verdict.disputed for verdict in own)]
        if asked:
            count = sum(verdict.disputed for own in outcome.verdicts for verdict in own)
            message = f"rules of extraction disagree on {count} of {len(outcome.completions)} answers; see evaluations/"
            self.run.event("grading", message, self.state.step, exam=outcome.exam.name, prompt_ids=asked)

    def _restore(self) -> None:
        """Go back to the newest whole checkpoint, undoing in the folder what came after it; or to the beginning."""
        folder, problems = newest_checkpoint(self.run)
        if folder is not None:
            self.state = load_state(folder)
            self.saved = (self.state.step, self.state.evaluated, self.state.iteration)
            self._restore_reference(folder / self._reference_file.name)
            load_tensors(folder, self.parts.policy.model, self.parts.optimizer, self._others())
        begun = bool(self.run.lengths()["metrics.jsonl"])
        with reading(self.run.path, "put the folder back as the run left it, or choose another --out"):
            damages = self.run.cut_back(self.state.lengths, self.state.step)
            damages += self.run.table_problems("rollouts", range(1, self.state.step + 1))
            damages += self.run.table_problems("evaluations", map(int, self.state.evaluations))
            for values in self.run.metrics():  # to know of the last steps; what is said of them was said then
                self.watch.see(values)
                if self.auditor is not None:
                    self.auditor.alarm(values)
        self.parts.engine.load_weights(self.parts.policy, self.state.step)
        for problem in problems:
            self.run.event("checkpoint_unusable", problem, self.state.step)
            self.reporter.note(f"Note: checkpoint {problem}; the one of step {self.state.step} is used")
        for damage in damages:
            self.run.event("damaged", damage, self.state.step)
            self.reporter.note(f"Note: {damage}; what is trained does not depend on it")
        if not problems:
            drop_old(self.run, self.state)  # what a kill left behind
        for change in self.parts.changes:
            self.run.event("changed", f"{change}; from here on it is another run's", self.state.step)
            self.reporter.note(f"Note: {change}; see events.jsonl")
        if folder is None:
            for task, count in self.parts.filtered.items():
                message = f"{count} prompts of {task} are too long and were left out"
                self.run.event("filtered", message, 0, task=task, prompts=count)
        for halving in (self.run.read_json("environment.json") or {}).get("halvings", []):
            if halving["step"] > self.state.step:  # its own event is of the steps that are now made again
                size, after, made = halving["size"], halving["after"], halving["step"]
                message = f"{size} stays {after}, as memory ran out in step {made} before the run was resumed"
                self.run.event("memory", message, self.state.step, size=size, after=after)
        if folder is not None or begun:
            self.run.event("resume", f"continued after step {self.state.step}", self.state.step)

    def _restore_reference(self, file: Path) -> None:
        """The reference of a later iteration, by way of the policy, whose own weights are put back after it."""
        if not file.is_file():
            return
        self._reference_file.parent.mkdir(exist_ok=True)
        link_file(file, self._reference_file)
        with reading(file, "take the checkpoint before it"):
            put_weights(load_file(file), named_weights(self.parts.policy.model))
        self.parts.reference = self.parts.policy.frozen_copy()

    def _summary(self, outcome: str) -> dict[str, Any]:
        state = self.state
        before = state.evaluations.get("0", {})
        after = state.evaluations.get(str(state.step), {}) if state.step else {}
        self._note_memory()
        return {
            "state": outcome,
            "steps": state.step,
            "train_seconds": state.train_seconds,
            "accuracy_before": before.get("accuracy"),
            "accuracy_after": after.get("accuracy"),
            "interval_before": before.get("interval"),
            "interval_after": after.get("interval"),
            "questions": before.get("questions"),
            "benchmarks": {
                exam.name: {
                    "domain": exam.domain,
                    "before": state.benchmarks.get("0", {}).get(exam.name),
                    "after": state.benchmarks.get(str(state.step), {}).get(exam.name) if state.step else None,
                }
                for exam in self.parts.exams
                if exam.name
            },
            "peak_memory_bytes": state.peak_memory_bytes,
            "weights_sha256": tensors_sha256(self.parts.policy.weights()),
        }


@dataclass(frozen=True)
class _Learner:
    """What an update is of: a model, its part that is trained, its optimizer, and the loss of a micro-batch."""

    computed_by: LanguageModel
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[Batch], torch.Tensor]
    rate: float


class _Packed:
    """A step's groups in micro-batches, which can be packed anew into smaller ones. `learned`: the policy has moved
    since, so that the log-probabilities that they hold cannot be computed again."""

    def __init__(
        self, groups: Sequence[Group], weights: TokenWeights, policy: LanguageModel, with_kl: bool, tokens: int
    ) -> None:
        self.groups, self.weights, self.policy, self.with_kl = groups, weights, policy, with_kl
        self.tokens, self.learned = tokens, False
        self.batches = self._pack()

    def at(self, tokens: int) -> list[Batch]:
        """In micro-batches of so many tokens."""
        if tokens != self.tokens:
            if self.learned:
                keep_logprobs(self.groups, self.batches)
            self.tokens = tokens
            self.batches = self._pack()
            if self.learned:
                put_logprobs(self.groups, self.batches, torch.promote_types(self.policy.dtype, torch.float32))
        return self.batches

    def _pack(self) -> list[Batch]:
        return pack(self.groups, self.weights, self.tokens, with_kl=self.with_kl, device=self.policy.device)


class _Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    @property
    def total(self) -> float:
        return math.fsum(self.seconds.values())


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then constant, linear or half a cosine towards 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.learning_rate * factor[settings.schedule]
