"""Algorithm 1 of DeepSeekMath (arXiv 2402.03300).

    for each iteration: π_ref ← π_θ; train the reward model on new samples labeled by rule
      for each step: π_old ← π_θ; sample G completions of each question from π_old; score them; compute advantages
        for each of μ rounds: for each minibatch: one step of AdamW on the objective

The paper trains the reward model at the end of an iteration. Here it learns at the start of the next one, and before
the first, so that every trained reward model is used.
"""

from __future__ import annotations

from itertools import product

from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import select
from gruppo.training.run import TrainingRun


def run_training(run: TrainingRun) -> None:
    """Train until the last step, or until a callback asks to stop."""
    for number in run.remaining_steps():  # evaluates and saves between steps
        if run.iterations.due():
            run.iterations.begin()  # π_ref ← π_θ; train the reward model
        else:
            train_step(run, number)


def train_step(run: TrainingRun, number: int) -> None:
    """One exploration stage and its updates, μ on each minibatch; `number` is counted from 1."""
    step = run.start_step(number)

    groups = run.rollouts.collect(step)  # questions, G completions of each from π_old (or, with a lag, before), rewards
    select(groups, run.method)  # which completions the method learns from

    run.policy.score(groups, step)  # π_old and π_ref, if advantages depend on them
    run.value_model.score(groups, step)  # V, if there is a value model
    assign_advantages(groups, run.method, step.metrics, run.reward_weights, run.recipe.critic)

    minibatches = run.policy.pack(groups, step)  # denominators cover a minibatch, by default the step
    updates = product(range(run.method.inner_updates), minibatches)  # μ; none if there is nothing to learn
    for update, (_, minibatch) in enumerate(updates):
        run.policy.update(minibatch, update, step)
        run.value_model.update(minibatch, run.policy.rate(step), update, step)

    run.load_weights(step)  # the engine samples from the new policy
    run.finish_step(step, groups, minibatches)  # rollouts, metrics, warnings, callbacks
