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
    "reward_model_labels": "Use easier or harder prompts, or more samples per prompt: a reward model learns nothing "
    "from labels that are all alike.",
    "audit": "Read completions with a high reward that the audit scores low: the reward pays for something that the "
    "task does not ask for.",
    "dynamic_sampling_exhausted": "Use prompts that the policy solves sometimes, or raise "
    "method.dynamic_sampling_rounds or sampling.group_size.",
    "ambiguous_answer": "Read these answers in the evaluation; another evaluation.grader, or a prompt that asks for a "
    "form of the answer, decides them.",
    "filtered": "Raise task.max_prompt_tokens, or shorten these prompts.",
    "ids_without_text": "Use the tokenizer that belongs to the model.",
    "memory": "Nothing: smaller micro-batches change no result, but take longer.",
    "nonfinite": "Inspect the batch, which is in the run folder, and start again with a lower learning rate.",
    "worker_restarted": "Once is harmless. If it happens again, see rewards.log: a reward function or an environment "
    "should load in a new process, and change nothing outside of itself.",
    "engine_lost": "Once is harmless: no result changes. If it happens again, read the cause in the message; often the "
    "machine has too little memory for its engines (engine.memory, cluster.engines).",
    "rank_lost": "Once is harmless: the run has repeated the steps since its last checkpoint. If it happens again, "
    "read the cause in the message; most often a machine has too little memory for its ranks (run.memory).",
    "checkpoint_unusable": "Check the disk. The run has continued from an older checkpoint, and repeats steps.",
    "damaged": "Restore the file from a copy if you need it; training does not depend on it.",
    "waiting": "Look at the part that is named: the log of a reward or an environment, the load of a server, the disk "
    "or the network. Nothing is lost: the run goes on when the part answers, and calls of rewards and environments end "
    "at their time limits.",
    "tracker": "Nothing for the run, which goes on without it; check its installation, login and network.",
}
NOTHING_TO_DO = frozenset(
    {"resume", "changed", "warning", "engine_back"}
)  # kinds of events; a warning has advice by its own name


def advice_for(event: Mapping[str, Any]) -> str:
    """What to do about an event; "" if there is nothing to do, or the warning has passed."""
    return "" if event.get("passed") else ADVICE.get(str(event.get("warning") or event.get("kind")), "")
