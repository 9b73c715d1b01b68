"""Names of other trainers (TRL, verl, OpenRLHF) for what a recipe says, and the fields of gruppo that say it.

An unknown field with one of these names is answered with gruppo's field. A name with a dot matches only below that
table, such as verl's `rollout.n`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_STEP = (
    "sampling.prompts_per_step × sampling.group_size, the completions of a step; the micro-batch is derived from "
    "run.memory"
)
_CLIP = "method.clip_low and method.clip_high"
_KL = "method.kl_coef, the weight of the KL term"
_RECORDED = "nothing: every step is recorded in the run folder"
_SAMPLER = "nothing: gruppo has its own engine"

NAMES = {
    # Length of the run, steps and batches
    "max_steps": "run.steps",
    "total_training_steps": "run.steps",
    "num_train_epochs": "run.epochs",
    "total_epochs": "run.epochs",
    "num_epochs": "run.epochs",
    "num_episodes": "run.epochs",
    "save_steps": "run.checkpoint_every",
    "save_freq": "run.checkpoint_every",
    "eval_steps": "evaluation.every",
    "test_freq": "evaluation.every",
    "logging_steps": _RECORDED,
    "log_completions": _RECORDED,
    "run_name": "run.name",
    "experiment_name": "run.name",
    "output_dir": "--out on the command line, or out= in Python",
    "default_local_dir": "--out on the command line, or out= in Python",
    "save_path": "--out on the command line, or out= in Python",
    "resume_from_checkpoint": "--resume on the command line, or resume=True in Python",
    "train_batch_size": "sampling.prompts_per_step (verl), or " + _STEP,
    "rollout_batch_size": "sampling.prompts_per_step",
    "generation_batch_size": _STEP,
    "per_device_train_batch_size": _STEP,
    "gradient_accumulation_steps": _STEP,
    "steps_per_generation": _STEP,
    "micro_train_batch_size": _STEP,
    "micro_rollout_batch_size": _STEP,
    "ppo_micro_batch_size_per_gpu": _STEP,
    "gradient_checkpointing": "nothing: activations are recomputed when run.memory requires it",
    "enable_gradient_checkpointing": "nothing: activations are recomputed when run.memory requires it",
    "ref_model_sync_steps": "run.iterations: the reference is reset at the start of each iteration",
    "sync_ref_model": "run.iterations: the reference is reset at the start of each iteration",
    # Sampling
    "num_generations": "sampling.group_size",
    "n_samples_per_prompt": "sampling.group_size",
    "rollout.n": "sampling.group_size",
    "n": "sampling.group_size",
    "num_samples": "sampling.group_size",
    "g": "sampling.group_size",
    "evaluation.num_generations": "evaluation.samples",
    "evaluation.n": "evaluation.samples",
    "num_generations_eval": "evaluation.samples",
    "max_completion_length": "sampling.max_tokens",
    "max_response_length": "sampling.max_tokens",
    "response_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "generate_max_len": "sampling.max_tokens",
    "max_prompt_length": "task.max_prompt_tokens",
    "prompt_max_len": "task.max_prompt_tokens",
    "truncation": 'task.overlong: "refuse" or "filter"',
    "filter_overlong_prompts": 'task.overlong = "filter"',
    "use_vllm": _SAMPLER,
    "vllm_mode": _SAMPLER,
    "vllm_num_engines": _SAMPLER,
    "gpu_memory_utilization": "run.memory",
    "vllm_gpu_memory_utilization": "run.memory",
    "max_tool_calling_iterations": "environment.turns",
    # Objective
    "beta": f"{_KL} (β of DPO is method.dpo_beta)",
    "kl_beta": _KL,
    "kl_loss_coef": _KL,
    "init_kl_coef": _KL,
    "kl_penalty_coef": _KL,
    "kl_ctrl": _KL,
    "use_kl_loss": 'method.kl_coef (0 for no KL); method.kl_estimator = "k1" subtracts the KL from the reward',
    "use_kl_in_reward": 'method.kl_estimator = "k1", which subtracts the KL from the reward',
    "kl_loss_type": "method.kl_estimator",
    "kl_penalty": "method.kl_estimator",
    "epsilon": _CLIP,
    "eps": _CLIP,
    "clip": _CLIP,
    "clip_range": _CLIP,
    "cliprange": _CLIP,
    "clip_ratio": _CLIP,
    "clip_eps": _CLIP,
    "eps_clip": _CLIP,
    "eps_clip_low_high": _CLIP,
    "epsilon_low": "method.clip_low",
    "clip_ratio_low": "method.clip_low",
    "epsilon_high": "method.clip_high",
    "clip_ratio_high": "method.clip_high",
    "loss_type": 'method.name, or method.aggregation ("sequence-mean" is TRL\'s "grpo", "token-mean" its "dapo", '
    '"constant" its "dr_grpo")',
    "loss_agg_mode": "method.aggregation",
    "adv_estimator": "method.name",
    "advantage_estimator": "method.name",
    "algorithm": "method.name",
    "scale_rewards": "method.scale",
    "norm_adv_by_std_in_grpo": "method.scale",
    "importance_sampling_level": 'method.ratio: "token" or "sequence"',
    "num_iterations": "method.inner_updates (updates on the completions of one step)",
    "ppo_epochs": "method.inner_updates",
    "max_epochs": "method.inner_updates",
    "mu": "method.inner_updates",
    "mask_truncated_completions": "method.mask_truncated",
    "overlong_filtering": "method.mask_truncated",
    "dynamic_sampling": "method.dynamic_sampling_rounds",
    "dynamic_filtering": "method.dynamic_sampling_rounds",
    "filter_groups": "method.dynamic_sampling_rounds",
    "max_num_gen_batches": "method.dynamic_sampling_rounds",
    "vllm_importance_sampling_correction": "method.tis_cap",
    "vllm_importance_sampling_cap": "method.tis_cap",
    "vllm_importance_sampling_clip_max": "method.tis_cap",
    "tis_imp_ratio_cap": "method.tis_cap",
    "rollout_is_threshold": "method.tis_cap",
    # Value model
    "lam": "critic.gae_lambda",
    "lambd": "critic.gae_lambda",
    "cliprange_value": "critic.clip",
    "value_clip": "critic.clip",
    "critic.clip_range": "critic.clip",
    "critic_learning_rate": "critic.learning_rate",
    "critic.optim.lr": "critic.learning_rate",
    # Optimizer
    "lr": "optimizer.learning_rate",
    "actor_learning_rate": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "lr_warmup_ratio": "optimizer.warmup_ratio",
    "lr_warmup_steps_ratio": "optimizer.warmup_ratio",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_betas": "optimizer.beta1 and optimizer.beta2",
    "betas": "optimizer.beta1 and optimizer.beta2",
    "adam_epsilon": "optimizer.epsilon",
    "l2": "optimizer.weight_decay",
    "grad_clip": "optimizer.max_grad_norm",
    "optimizer.clip": "optimizer.max_grad_norm",
    "clip_grad": "optimizer.max_grad_norm",
    "max_norm": "optimizer.max_grad_norm",
    # Model
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "pretrain": "model.name",
    "model.path": "model.name",
    "torch_dtype": "model.dtype",
    "bf16": 'model.dtype = "bfloat16"',
    "fp16": 'model.dtype = "bfloat16" (float16 is not supported)',
    "use_peft": "the table [model.lora]",
    "peft_config": "the table [model.lora]",
    "lora.r": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.targets",
    "target_modules": "model.lora.targets",
    # Data
    "dataset": "task.name",
    "path": "task.name",
    "dataset_name": "task.name",
    "dataset_path": "task.name",
    "train_files": "task.name",
    "prompt_data": "task.name",
    "val_files": "evaluation.task",
    "eval_dataset": "evaluation.task",
    "dataset_config": "task.options.name",
    "dataset_train_split": "task.split",
    "dataset_test_split": "evaluation.task.split",
    "system_prompt": "task.system",
    "prompt_key": 'task.columns, e.g. columns = {prompt = "question"}',
    "input_key": 'task.columns, e.g. columns = {prompt = "question"}',
    "label_key": 'task.columns, e.g. columns = {answer = "solution"}',
    "input_template": "task.template",
    "prompt_template": "task.template",
    "apply_chat_template": 'task.system ("" turns text prompts into conversations)',
    # Rewards
    "reward_funcs": "reward.functions",
    "reward_fn": "reward.functions",
    "custom_reward_function": "reward.functions",
    "remote_rm_url": "reward.functions",
    "reward_weights": "reward.weights",
    "reward_pretrain": "reward_model.name",
    "reward_model_path": "reward_model.name",
}


def gruppo_name(location: Sequence[str], known: Iterable[str] = ()) -> str | None:
    """What to write in place of a field of another trainer, given its tables and its name; None if it is unknown.

    `known`: the fields of the table that the name was found in. If one of them has the name that is meant, it is meant.
    """
    names = [part.lower().replace("-", "_") for part in location]
    for length in range(min(3, len(names)), 0, -1):
        if answer := NAMES.get(".".join(names[-length:])):
            table, _, field = answer.rpartition(".")
            return ".".join((*location[:-1], field)) if field in known and table.isidentifier() else answer
    return None


def fields_named(name: str, tables: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """All fields with this name, as `table.field`, in the order of the tables."""
    return [f"{table}.{field}" for table, fields in tables for field in fields if field == name]
