"""Measured durations of sampling, scoring and updates."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import TYPE_CHECKING

from gruppo.config.recipe import Recipe
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from gruppo.engines.base import Engine
    from gruppo.models.policy import LanguageModel
    from gruppo.training.inputs import RunInputs
    from gruppo.training.memory_estimate import ChosenSizes, Workload

DECODED_TOKENS = 3  # tokens per slot with which decoding is timed
PROMPT_TOKENS = 1024  # maximum number of prompt tokens with which the prefill is timed
UPDATE_TOKENS = 512  # tokens of the micro-batch with which an update is timed
REPEATS = 2  # the faster one counts, because other load on the machine only slows down
SECONDS = 60.0  # default limit for sampling in the smoke test; its rewards get the same limit


def time_generation(engine: Engine, inputs: RunInputs, slots: int, stop: Stop) -> tuple[float, float]:
    """Seconds per prompt token, and seconds per decoding step with all slots filled, on real prompts."""
    from gruppo.engines.base import Request, SamplingParams

    prompts = [inputs.prompts.draw(0, 1)[0]]
    for prompt in inputs.prompts.draw(1, slots - 1):
        if sum(len(chosen.token_ids) for chosen in [*prompts, prompt]) <= PROMPT_TOKENS:
            prompts.append(prompt)
    shares = [len(range(place, slots, len(prompts))) for place in range(len(prompts))]
    requests = [
        Request(prompt.token_ids, [(0, place, number) for number in range(share)])
        for place, (prompt, share) in enumerate(zip(prompts, shares, strict=True))
    ]

    def seconds(tokens: int) -> float:
        """Seconds to sample exactly `tokens` tokens per completion."""
        stop.check()
        start = time.perf_counter()
        engine.generate(requests, SamplingParams(inputs.sampling.temperature, tokens, min_tokens=tokens))
        return time.perf_counter() - start

    seconds(1)  # warm-up
    one, several = (min(seconds(tokens) for _ in range(REPEATS)) for tokens in (1, 1 + DECODED_TOKENS))
    return one / sum(len(prompt.token_ids) for prompt in prompts), max(0.0, several - one) / DECODED_TOKENS


def round_seconds(recipe: Recipe, generation: float, forward: float, backward: float, optimizer: float) -> float:
    """Seconds per iteration for the reward model: sample labels, evaluate it, train it, and evaluate it again.

    `generation`, `forward` and `backward`: seconds of one step for sampling and for both passes over its completions.
    `optimizer`: seconds of one optimizer step. 0 without a reward model.
    """
    model, sampling = recipe.reward_model, recipe.sampling
    if model is None:
        return 0.0
    scale = model.prompts / sampling.prompts_per_step
    trained = scale * (1 - model.held_out) / (1 - model.replay_fraction)
    updates = math.ceil(trained * sampling.prompts_per_step * sampling.group_size / model.batch_size)
    learning = model.epochs * (trained * (forward + backward) + updates * optimizer)
    return scale * (generation + 2 * model.held_out * forward) + learning


def time_update(
    recipe: Recipe, policy: LanguageModel, work: Workload, chosen: ChosenSizes
) -> tuple[float, float, float]:
    """Seconds per token of a packed micro-batch, forward and backward, and seconds per optimizer step.

    The optimizer step has a learning rate of 0, so it leaves the policy unchanged.
    """
    import torch

    from gruppo.models.footprint import trial_batch
    from gruppo.models.packing import score
    from gruppo.training.optimizer import make_optimizer

    layout = work.micro_batches(min(chosen.micro_batch_tokens, UPDATE_TOKENS))[0]
    batch, tokens = trial_batch(policy, layout), sum(prompt + sum(lengths) for prompt, lengths in layout)
    optimizer = make_optimizer(recipe.optimizer.model_copy(update={"learning_rate": 0.0}), policy.model, policy)
    durations = []
    for _ in range(REPEATS):
        with policy.precision():
            score(policy, trial_batch(policy, [(1, [1, 1])]), 1.0)  # weights are prepared once for all micro-batches
            times = [time.perf_counter()]
            loss = score(policy, batch, recipe.sampling.temperature)[0].mean()
            times.append(time.perf_counter())
            with torch.autocast(policy.device.type, enabled=False):
                loss.backward()
            float(loss.detach())  # waits until an accelerator has finished
            times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        durations.append([after - before for before, after in pairwise(times)])
    optimizer.zero_grad(set_to_none=True)
    forward, backward, optimizer_step = map(min, zip(*durations, strict=True))
    return forward / tokens, backward / tokens, optimizer_step
