"""How long sampling, scoring and an update take, measured."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import TYPE_CHECKING

from gruppo.config.recipe import Recipe
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from gruppo.models.policy import LanguageModel
    from gruppo.training.inputs import RunInputs
    from gruppo.training.memory_estimate import ChosenSizes, Workload

DRAWN = 3  # tokens a row that decoding is timed by
PROMPT_TOKENS = 1024  # at most, whose computing is timed
UPDATE_TOKENS = 512  # of the micro-batch that an update is timed by
REPEATS = 2  # of which the quicker counts: whatever else the machine does makes one slower
SECONDS = 60.0  # for sampling a trial, and as many for its rewards


def time_generation(policy: LanguageModel, inputs: RunInputs, slots: int, stop: Stop) -> tuple[float, float]:
    """Seconds to compute a token of a prompt, and for a decoding step of all slots, by the engine on real prompts."""
    from gruppo.engines import build_engine
    from gruppo.engines.base import Request, SamplingParams

    prompts = [inputs.prompts.draw(0, 1)[0]]
    for prompt in inputs.prompts.draw(1, slots - 1):
        if sum(len(each.token_ids) for each in [*prompts, prompt]) <= PROMPT_TOKENS:
            prompts.append(prompt)
    shares = [len(range(place, slots, len(prompts))) for place in range(len(prompts))]
    requests = [
        Request(prompt.token_ids, [(0, place, number) for number in range(share)])
        for place, (prompt, share) in enumerate(zip(prompts, shares, strict=True))
    ]
    engine = build_engine(policy, slots)

    def seconds(tokens: int) -> float:
        """Nothing ends before its last token."""
        stop.check()
        start = time.perf_counter()
        engine.generate(requests, SamplingParams(inputs.sampling.temperature, tokens, min_tokens=tokens))
        return time.perf_counter() - start

    seconds(1)  # to warm up
    first, more = (min(seconds(tokens) for _ in range(REPEATS)) for tokens in (1, 1 + DRAWN))
    return first / sum(len(prompt.token_ids) for prompt in prompts), max(0.0, more - first) / DRAWN


def round_seconds(recipe: Recipe, drawing: float, forward: float, backward: float, optimizer: float) -> float:
    """Labels sampled, and a reward model measured, trained and measured again; from the seconds of a step's sampling,
    and those of its completions forward and backward."""
    model, sampling = recipe.reward_model, recipe.sampling
    if model is None:
        return 0.0
    scale = model.prompts / sampling.prompts_per_step
    trained = scale * (1 - model.held_out) / (1 - model.replay_fraction)
    updates = math.ceil(trained * sampling.prompts_per_step * sampling.group_size / model.batch_size)
    learning = model.epochs * (trained * (forward + backward) + updates * optimizer)
    return scale * (drawing + 2 * model.held_out * forward) + learning


def time_update(
    recipe: Recipe, policy: LanguageModel, asked: Workload, chosen: ChosenSizes
) -> tuple[float, float, float]:
    """Seconds a token of a packed micro-batch forward and backward, and those of an optimizer step of length 0, which
    leaves the policy as it is."""
    import torch

    from gruppo.models.packing import score
    from gruppo.training.memory_estimate import trial_batch
    from gruppo.training.optimizer import make_optimizer

    layout = asked.micro_batches(min(chosen.micro_batch_tokens, UPDATE_TOKENS))[0]
    batch, tokens = trial_batch(policy, layout), sum(prompt + sum(own) for prompt, own in layout)
    optimizer = make_optimizer(recipe.optimizer.model_copy(update={"learning_rate": 0.0}), policy.model, policy)
    taken = []
    for _ in range(REPEATS):
        with policy.precision():
            score(policy, trial_batch(policy, [(1, [1, 1])]), 1.0)  # weights are prepared once for all micro-batches
            marks = [time.perf_counter()]
            loss = score(policy, batch, recipe.sampling.temperature)[0].mean()
            marks.append(time.perf_counter())
            with torch.autocast(policy.device.type, enabled=False):
                loss.backward()
            float(loss.detach())  # so that an accelerator has come to its end
            marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        taken.append([after - before for before, after in pairwise(marks)])
    optimizer.zero_grad(set_to_none=True)
    forward, backward, updating = map(min, zip(*taken, strict=True))
    return forward / tokens, backward / tokens, updating
