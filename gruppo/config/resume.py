"""What may change in the recipe of a run when it is resumed: one rule for every field."""

from __future__ import annotations

# FREE fields do not change what the run computes. LENGTH fields may change if the steps that are done stay as they are.
# MEMORY chooses sizes anew, which changes rounding. FIXED fields cannot change.
FREE, LENGTH, MEMORY, FIXED = "free", "length", "memory", "fixed"

# Rule -> table -> fields. The rule of a field that is a table holds for everything in it.
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    FREE: {
        "run": ("name", "checkpoint_every", "trackers"),
        "model": ("name", "trust_remote_code"),  # the weights behind the name are compared
        "engine": ("memory", "device"),
        "reward": ("timeout", "workers", "failure_limit", "memory", "environment"),
        "environment": ("seconds", "memory", "workers"),
        "cluster": ("engines", "engine_devices", "address", "weights", "patience"),  # rounding may differ
        "audit": ("function", "options", "share", "window"),
        "evaluation": ("task", "questions", "every", "samples", "max_tokens", "grader", "decoding", "inherit"),
        "benchmarks": ("task", "questions", "every", "samples", "max_tokens", "grader", "decoding", "inherit", "name"),
        **dict.fromkeys(("task", "mixture"), ("memory",)),
    },
    LENGTH: {"run": ("steps", "epochs", "iterations"), "optimizer": ("warmup_steps", "warmup_ratio")},
    MEMORY: {"run": ("memory",), "cluster": ("trainers", "shards")},
    FIXED: {
        "run": ("seed",),
        "model": ("device", "dtype", "attention", "compile", "lora"),
        **dict.fromkeys(
            ("task", "mixture"),
            (
                "name", "options", "split", "columns", "template", "system", "completion", "held_out",
                "held_out_by", "max_prompt_tokens", "overlong", "weight", "chat_template_kwargs", "tools",
            ),
        ),
        "reward": ("functions", "weights", "options"),
        "reward_model": (
            "kind", "name", "weight", "prompts", "held_out", "learning_rate", "epochs", "batch_size", "replay_fraction",
            "replay_capacity", "seed", "split", "continuations", "labels",
        ),
        "environment": ("name", "options", "turns", "output", "weight", "run_model_code_WITHOUT_A_SANDBOX"),
        "method": (
            "name", "source", "baseline", "scale", "credit", "success_threshold", "deduplicate", "max_per_prompt",
            "dpo_beta", "ratio", "surrogate", "aggregation", "clip_low", "clip_high", "kl_coef", "kl_estimator",
            "kl_importance", "old_logprobs", "tis_cap", "inner_updates", "minibatches", "mask_truncated",
            "dynamic_sampling_rounds", "advantage_epsilon",
        ),
        "critic": ("name", "learning_rate", "clip", "gamma", "gae_lambda"),
        "engine": ("name",),
        "cluster": ("lag",),
        "sampling": ("prompts_per_step", "group_size", "max_tokens", "temperature", "stop"),
        "optimizer": (
            "learning_rate", "schedule", "beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm", "state",
        ),
    },
}  # fmt: skip

# Table -> why its FIXED fields cannot change.
REASONS = {
    "run": "every sampled token depends on it",
    "model": "the steps that are done were computed with it",
    "task": "it determines the prompts and their order",
    "mixture": "it determines the prompts and their order",
    "reward": "the steps that are done were scored with it",
    "reward_model": "the steps that are done were scored with it",
    "environment": "the completions so far were sampled with it",
    "method": "the steps that are done were computed with it",
    "critic": "the steps that are done were computed with it",
    "sampling": "the completions so far were sampled with it",
    "engine": "the completions so far were sampled with it",
    "cluster": "it determines the weights that sampled each step",
    "optimizer": "the steps that are done were computed with it",
}


def rule_of(field: str) -> str:
    """The rule for a field such as "evaluation.task.name" or "benchmarks[0].every".

    A table as a whole (a table that is added or left out) has the rule of its fields, and FIXED if they differ.
    """
    table, _, rest = field.partition(".")
    table, name = table.partition("[")[0], rest.partition(".")[0].partition("[")[0]
    rules = {rule for rule, tables in RULES.items() for known in tables.get(table, ()) if name in ("", known)}
    return rules.pop() if len(rules) == 1 else FIXED
