"""What to do about a warning or an event, in a sentence. docs/warnings.md explains the warnings in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By the name of the warning, or else the kind of the event.
ADVICE = {
    "no_nonzero_advantage": "Read the groups of this step: if all rewards are at the minimum, use easier prompts or a "
    "reward with intermediate values; if all are at the maximum, the task is solved. A larger sampling.group_size or "
    "method.dynamic_sampling_rounds also helps.",
    "evaluation_falls": "Compare completions of early and late steps: what does the reward pay for? Export the best "
    "checkpoint with gruppo export RUN --to DIR --checkpoint best.",
    "lengths": "Longer: see whether the reward pays for length, or add the reward overlong. Shorter: the policy may be "
    "giving up; lower optimizer.learning_rate.",
    "everything_truncated": "Increase sampling.max_tokens, ask for shorter answers in the prompt, or add the reward "
    "overlong.",
    "entropy_collapses": "If the reward is at its maximum, training is done. Otherwise lower optimizer.learning_rate "
    "or method.inner_updates, or raise method.kl_coef, method.clip_high or sampling.temperature.",
    "engine_drifts": 'Set method.tis_cap = 2.0 or model.dtype = "float32", and compare.',
    "one_part_of_the_reward": "Check that the other reward function can be satisfied at all; change reward.weights, or "
    "let the easy function count only together with the other one.",
    "kl_explodes": "Lower optimizer.learning_rate, or increase method.kl_coef or optimizer.warmup_steps. Read the "
    "groups of this step: the reward may pay for strange text.",
    "gradient_spikes": "One spike is clipped and harmless. Many mean that optimizer.learning_rate is too high.",
    "reward_model_guesses": "Give the reward model more or better balanced labels (reward_model.prompts), or train it "
    "longer (reward_model.epochs).",
    "tokens_without_text": "Use the tokenizer that belongs to the model.",
    "reward_failed": "gruppo rerun-reward repeats the failed call; its file is in failures/.",
}


def advice_for(event: Mapping[str, Any]) -> str:
    """What to do about an event; "" if there is nothing to do, or the warning has passed."""
    return "" if event.get("passed") else ADVICE.get(str(event.get("warning") or event.get("kind")), "")
