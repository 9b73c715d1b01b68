"""Names of other trainers (TRL, verl, OpenRLHF, Unsloth, LLaMA-Factory) for what a recipe says, and gruppo's fields.

An unknown field with one of these names is answered with gruppo's field, or with the reason why gruppo has none. A name
with a dot matches only below that table, such as verl's `model.path`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

_STEP = (
    "sampling.prompts_per_step × sampling.group_size, the completions of a step; the micro-batch is derived from "
    "run.memory"
)
_MINI_BATCH = (
    "method.minibatches, the number of parts of a step's completions (sampling.prompts_per_step × sampling.group_size) "
    "that have an update each"
)
_LENGTH = "task.max_prompt_tokens for the prompt and sampling.max_tokens for the completion"
_CLIP = "method.clip_low and method.clip_high"
_KL = "method.kl_coef, the weight of the KL term"
_KL_IN_REWARD = 'method.kl_estimator = "k1", which subtracts the KL from the reward'
_REFERENCE = "run.iterations: the reference is reset at the start of each iteration"
_OUT = "--out"
_RESUME = "--resume"
_TRACKERS = 'run.trackers, a list such as ["tensorboard", "wandb"]'

NAMES = {
    # Length of the run, steps and batches
    "max_steps": "run.steps",
    "total_training_steps": "run.steps",
    "num_train_epochs": "run.epochs",
    "total_epochs": "run.epochs",
    "num_epochs": "run.epochs",
    "num_episodes": "run.epochs",
    "total_episodes": "run.epochs",
    "save_steps": "run.checkpoint_every",
    "save_freq": "run.checkpoint_every",
    "run_name": "run.name",
    "experiment_name": "run.name",
    "wandb_run_name": "run.name",
    "output_dir": _OUT,
    "default_local_dir": _OUT,
    "save_path": _OUT,
    "ckpt_path": _OUT,
    "report_to": _TRACKERS,
    "log_with": _TRACKERS,
    "logger": _TRACKERS,
    "logger_type": _TRACKERS,
    "use_wandb": 'run.trackers = ["wandb"]',
    "use_swanlab": 'run.trackers = ["swanlab"]',
    "use_tensorboard": 'run.trackers = ["tensorboard"]',
    "resume_from_checkpoint": _RESUME,
    "resume_mode": _RESUME,
    "load_checkpoint": _RESUME,
    "data_seed": "run.seed",
    "random_state": "run.seed",
    "batch_size": "sampling.prompts_per_step",
    "rollout_batch_size": "sampling.prompts_per_step",
    "train_batch_size": f"sampling.prompts_per_step (verl), or {_STEP}",
    "generation_batch_size": _STEP,
    "per_device_train_batch_size": _STEP,
    "gradient_accumulation_steps": _STEP,
    "steps_per_generation": "method.minibatches, if it is more than gradient_accumulation_steps",
    "ppo_mini_batch_size": _MINI_BATCH,
    "mini_batch_size": _MINI_BATCH,
    "num_mini_batches": _MINI_BATCH,
    "gpu_memory_utilization": "run.memory",
    "vllm_gpu_memory_utilization": "run.memory",
    "ref_model_sync_steps": _REFERENCE,
    "sync_ref_model": _REFERENCE,
    # Sampling
    "num_generations": "sampling.group_size",
    "num_return_sequences": "sampling.group_size",
    "n_samples_per_prompt": "sampling.group_size",
    "num_samples": "sampling.group_size",
    "rollout_n": "sampling.group_size",
    "n": "sampling.group_size",
    "g": "sampling.group_size",
    "max_completion_length": "sampling.max_tokens",
    "max_response_length": "sampling.max_tokens",
    "response_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "generate_max_len": "sampling.max_tokens",
    "stop_strings": "sampling.stop",
    "stop_words": "sampling.stop",
    "stop_sequences": "sampling.stop",
    "stop_token": "sampling.stop",
    "max_prompt_length": "task.max_prompt_tokens",
    "prompt_max_len": "task.max_prompt_tokens",
    "prompt_length": "task.max_prompt_tokens",
    "max_length": _LENGTH,
    "max_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "cutoff_len": _LENGTH,
    "truncation": 'task.overlong: "refuse" or "filter"',
    "filter_overlong_prompts": 'task.overlong = "filter"',
    "multi_turn.max_turns": "environment.turns",
    "max_turns": "environment.turns",
    "max_assistant_turns": "environment.turns",
    "max_user_turns": "environment.turns",
    "max_tool_calling_iterations": "environment.turns",
    "max_tool_response_length": "environment.output, in characters",
    "agent_func_path": "environment.name",
    # Objective
    "beta": f"{_KL} (β of DPO is method.dpo_beta)",
    "pref_beta": "method.dpo_beta",
    "kl_beta": _KL,
    "kl_loss_coef": _KL,
    "init_kl_coef": _KL,
    "kl_penalty_coef": _KL,
    "kl_ctrl": _KL,
    "use_kl_loss": f"method.kl_coef (0 for no KL); {_KL_IN_REWARD}",
    "use_kl_in_reward": _KL_IN_REWARD,
    "kl_loss_type": "method.kl_estimator",
    "kl_penalty": "method.kl_estimator",
    "use_bias_correction_kl": "method.kl_importance",
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
    "loss_mode": "method.name",
    "policy_loss_type": "method.name",
    "adv_estimator": "method.name",
    "advantage_estimator": "method.name",
    "algorithm": "method.name",
    "stage": "method.name",
    "scale_rewards": "method.scale",
    "normalize_advantages": "method.scale",
    "norm_adv_by_std_in_grpo": "method.scale",
    "no_advantage_std_norm": 'method.scale = "none"',
    "importance_sampling_level": 'method.ratio: "token" or "sequence"',
    "num_iterations": "method.inner_updates (updates on the completions of one step)",
    "num_ppo_epochs": "method.inner_updates",
    "ppo_epochs": "method.inner_updates",
    "max_epochs": "method.inner_updates",
    "mu": "method.inner_updates",
    "mask_truncated_completions": "method.mask_truncated",
    "overlong_filtering": "method.mask_truncated",
    "dynamic_sampling": "method.dynamic_sampling_rounds",
    "dynamic_filtering": "method.dynamic_sampling_rounds",
    "filter_groups": "method.dynamic_sampling_rounds",
    "filter_groups.enable": "method.dynamic_sampling_rounds",
    "max_num_gen_batches": "method.dynamic_sampling_rounds",
    "vllm_importance_sampling_correction": "method.tis_cap",
    "vllm_importance_sampling_cap": "method.tis_cap",
    "vllm_importance_sampling_clip_max": "method.tis_cap",
    "enable_vllm_is_correction": "method.tis_cap",
    "vllm_is_truncated_threshold": "method.tis_cap",
    "tis_imp_ratio_cap": "method.tis_cap",
    "rollout_is_threshold": "method.tis_cap",
    # Value model
    "lam": "critic.gae_lambda",
    "lambd": "critic.gae_lambda",
    "cliprange_value": "critic.clip",
    "value_clip": "critic.clip",
    "critic_learning_rate": "critic.learning_rate",
    "critic_pretrain": "critic.name",
    # Optimizer
    "lr": "optimizer.learning_rate",
    "actor_learning_rate": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_style": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps",
    "warmup_steps": "optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps",
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
    "base_model_name_or_path": "model.name",
    "model_name": "model.name",
    "model_id": "model.name",
    "pretrain": "model.name",
    "model.path": "model.name",
    "adapter_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "bf16": 'model.dtype = "bfloat16"',
    "pure_bf16": 'model.dtype = "bfloat16"',
    "fp16": 'model.dtype = "bfloat16" (float16 is not supported)',
    "use_cpu": 'model.device = "cpu"',
    "use_peft": "the table [model.lora]",
    "peft_config": "the table [model.lora]",
    "finetuning_type": "the table [model.lora], or leave it out to train all weights",
    "r": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "max_lora_rank": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target": "model.lora.targets",
    "lora_target_modules": "model.lora.targets",
    "target_modules": "model.lora.targets",
    # Data
    "dataset": "task.name",
    "dataset_name": "task.name",
    "dataset_path": "task.name",
    "task.path": "task.name",
    "mixture.path": "task.name",
    "evaluation.path": "task.name",
    "data.path": "task.name",
    "dataset.path": "task.name",
    "train_files": "task.name",
    "prompt_data": "task.name",
    "prompt_data_probs": "mixture.weight, in one table [[mixture]] for each task",
    "interleave_probs": "mixture.weight, in one table [[mixture]] for each task",
    "val_files": "evaluation.task",
    "eval_dataset": "evaluation.task",
    "dataset_config": "task.options.name",
    "prompt_split": "task.split",
    "dataset_train_split": "task.split",
    "dataset_test_split": "evaluation.task.split",
    "eval_split": "evaluation.task.split",
    "val_size": "task.held_out",
    "system_prompt": "task.system",
    "default_system": "task.system",
    "prompt_key": 'task.columns, e.g. columns = {prompt = "question"}',
    "input_key": 'task.columns, e.g. columns = {prompt = "question"}',
    "dataset_text_field": 'task.columns, e.g. columns = {prompt = "question"}',
    "label_key": 'task.columns, e.g. columns = {answer = "solution"}',
    "input_template": "task.template",
    "prompt_template": "task.template",
    "apply_chat_template": 'task.system ("" turns text prompts into conversations)',
    "apply_chat_template_kwargs": "task.chat_template_kwargs",
    "enable_thinking": "task.chat_template_kwargs, e.g. chat_template_kwargs = {enable_thinking = false}",
    # Rewards
    "reward_funcs": "reward.functions",
    "reward_fn": "reward.functions",
    "custom_reward_function": "reward.functions",
    "custom_reward_function.path": "reward.functions",
    "remote_rm_url": "reward.functions",
    "reward_weights": "reward.weights",
    "reward_pretrain": "reward_model.name",
    "reward_model_path": "reward_model.name",
    # Evaluation
    "eval_steps": "evaluation.every",
    "test_freq": "evaluation.every",
    "num_generations_eval": "evaluation.samples",
    "eval_n_samples_per_prompt": "evaluation.samples",
    "eval_temperature": "evaluation.decoding.temperature",
    "top_k": "evaluation.decoding.top_k (training samples from the full distribution)",
    "top_p": "evaluation.decoding.top_p (training samples from the full distribution)",
    "min_p": "evaluation.decoding.min_p (training samples from the full distribution)",
    "do_sample": "evaluation.decoding.temperature (0 takes the most likely token; training always samples)",
}

# Reasons why gruppo has no such field, with the names; "*" stands for any text.
_WITHOUT = {
    "every step is recorded in the run folder": "logging_* log_* disable_tqdm debug num_completions_to_print "
    "include_num_input_tokens_seen include_for_metrics skip_memory_metrics plot_loss",
    "a tracker has its own environment variables, such as WANDB_PROJECT (docs/trackers.md)": "wandb_* "
    "trackio_* swanlab_* project project_name",
    "nothing is uploaded; `gruppo export` writes a folder for the Hugging Face hub": "push_to_hub hub_*",
    "gruppo has its own engine": "vllm_* use_vllm sglang_* fast_inference rollout.mode enforce_eager "
    "enable_chunked_prefill enable_prefix_caching free_cache_engine cache_implementation use_cache "
    "max_num_batched_tokens max_num_seqs max_model_len transformers_continuous_batching_config generation_kwargs "
    "use_transformers_continuous_batching use_transformers_paged ds3_gather_for_generation async_train",
    "the micro-batch is derived from run.memory": "*micro_batch_size* micro_train_batch_size micro_rollout_batch_size "
    "eval_batch_size per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size torch_empty_cache_steps "
    "precompute_ref_batch_size use_dynamic_bsz use_dynamic_batch *max_token_len_per_gpu *max_tokens_per_gpu "
    "val_batch_size eval_do_concat_batches batch_eval_metrics",
    "activations are recomputed when run.memory requires it": "gradient_checkpointing* enable_gradient_checkpointing "
    "use_gradient_checkpointing activation_* enable_activation_offload",
    "a run uses one device, model.device": "ddp_* fsdp fsdp_* deepspeed local_rank accelerator_config "
    "parallelism_config tensor_model_parallel_size ulysses_sequence_parallel_size n_gpus_per_node nnodes *_num_nodes "
    "*_num_gpus_per_node colocate_* zero_stage adam_offload param_offload optimizer_offload device_map "
    "average_tokens_across_devices eval_use_gather_object use_cpu_offload ring_attn_size balance_batch",
    "gruppo chooses its own kernels": "attn_implementation flash_attn use_flash_attention* use_liger* liger_* "
    "torch_compile* use_torch_compile use_fused_kernels cast_lm_head_to_fp32 jit_mode_eval enable_jit_checkpoint "
    "use_unsloth* tf32 full_determinism",
    "sequences are packed without padding": "packing packing_* packing_samples eval_packing neat_packing padding_free "
    "pad_to_multiple_of padding_side use_remove_padding group_by_length length_column_name",
    "gruppo reads and tokenizes the rows itself": "dataloader_* dataset_num_proc dataset_kwargs dataset_streaming "
    "streaming preprocessing_num_workers overwrite_cache remove_unused_columns label_names train_sampling_strategy "
    "ignore_data_skip",
    "run.seed determines the order of the prompts": "shuffle shuffle_dataset shuffle_data data.shuffle",
    "tokenizer and chat template are those of the model": "eos_token pad_token chat_template_path tokenizer_name "
    "tokenizer_name_or_path custom_chat_template chat_template",
    "prompts are never truncated, only refused or left out (task.overlong)": "truncation_mode truncation_side",
    "the loss covers the completion, not the prompt": "completion_only_loss assistant_only_loss train_on_prompt "
    "train_on_inputs train_on_responses_only mask_history",
    "the latest two checkpoints and the best are kept": "save_total_limit save_strategy save_only_model "
    "save_on_each_node load_best_model_at_end metric_for_best_model greater_is_better max_ckpt_num "
    "max_actor_ckpt_to_keep max_critic_ckpt_to_keep restore_callback_states_from_checkpoint",
    "evaluation takes place before the first step, after the last, and every evaluation.every steps": "eval_strategy "
    "evaluation_strategy eval_on_start eval_delay val_before_train",
    "`gruppo train` trains and `gruppo eval` evaluates": "do_train do_eval do_predict prediction_loss_only val_only",
    "run.steps limits the training, and evaluation.questions the evaluation": "max_samples max_train_samples "
    "max_eval_samples",
    "the optimizer is AdamW": "optim optim_args optim_target_modules optimizer_type optim_type galore_* use_galore "
    "apollo_* use_apollo badam_* use_badam neftune_noise_alpha loraplus_*",
    "schedules are constant, linear or cosine, without options": "lr_scheduler_kwargs lr_scheduler_args min_lr_ratio "
    "min_lr num_cycles",
    "there is no dropout, so that sampling and training use the same distribution": "*dropout disable_dropout",
    "adapters are plain LoRA: rank, alpha and targets": "lora_modules_to_save modules_to_save lora_target_parameters "
    "target_parameters lora_task_type task_type use_dora use_rslora init_lora_weights lora_bias layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern exclude_modules loftq_config additional_target pissa_* bias",
    "weights are trained in float32, not quantized": "load_in_4bit load_in_8bit bnb_* use_bnb_nested_quant "
    "quantization_bit quantization_method bf16_full_eval fp16_full_eval full_finetuning",
    "model.name loads the files as they are; name a local folder for another revision": "model_revision "
    "model_init_kwargs cache_dir override_config",
    "training samples from the full distribution": "repetition_penalty frequency_penalty presence_penalty "
    "length_penalty num_beams bad_words guided_decoding* ignore_eos",
    "the loss has no entropy term": "entropy_* use_entropy* use_adaptive_entropy top_entropy_quantile ent_coef",
    "the policy term has two bounds, method.clip_low and method.clip_high": "delta dual_clip clip_ratio_c "
    "off_policy_mask_threshold sapo_* vespo_* vllm_importance_sampling_mode "
    "vllm_importance_sampling_clip_min",
    "method.kl_coef is constant": "kl_target kl_horizon target_kl horizon ppo_target adap_kl_ctrl",
    "rewards are used as they are; write a reward function that changes them": "reward_clip_range normalize_reward "
    "multi_objective_aggregation center_rewards_coefficient whiten_rewards ppo_whiten_rewards ppo_score_norm "
    "overlong_buffer_len overlong_penalty_factor missing_eos_penalty",
    "the loss of DPO is logistic, with method.dpo_beta": "label_smoothing label_smoothing_factor loss_weights ld_alpha "
    "f_divergence_type f_alpha_divergence_coef discopop_tau use_weighting desirable_weight undesirable_weight pref_* "
    "dpo_label_smoothing simpo_gamma kto_*",
    "gruppo computes the log-probabilities of the reference when it needs them": "precompute_ref_log_probs",
    "the reference is the initial policy": "ref_model_mixup_alpha ref_model ref_model_adapters ref_adapter_name",
    "the loss has no term for the router of experts": "router_aux_loss_coef aux_loss_coef moe_aux_loss_coef",
}
_REASONS = [(pattern, reason) for reason, patterns in _WITHOUT.items() for pattern in patterns.split()]

NOTHING = "nothing: "
"""The start of an answer that gives the reason why gruppo has no such field."""

# What fields mean in the tables of a value model, a reward model and an evaluation, which have fields of their own.
_IN_TABLE = {
    "critic": {"model.name": "critic.name", "optimizer.learning_rate": "critic.learning_rate", _CLIP: "critic.clip"},
    "reward_model": {
        "model.name": "reward_model.name",
        "optimizer.learning_rate": "reward_model.learning_rate",
        "run.epochs": "reward_model.epochs",
        "run.seed": "reward_model.seed",
        _STEP: "reward_model.batch_size",
    },
    "evaluation": {
        "sampling.group_size": "evaluation.samples",
        "sampling.max_tokens": "evaluation.max_tokens",
        "sampling.temperature": "evaluation.decoding.temperature",
        "sampling.stop": "evaluation.decoding.stop",
        "sampling.prompts_per_step": f"{NOTHING}the engine chooses how many answers it samples at a time",
        "task.name": "evaluation.task",
        "reward.functions": "evaluation.grader",
    },
}
_TABLES = {**{table: table for table in _IN_TABLE}, "benchmarks": "evaluation", "validation": "evaluation"}
_TABLES |= {"eval": "evaluation", "val_kwargs": "evaluation", "rm": "reward_model"}


def gruppo_name(location: Sequence[str], value: Any = None) -> str | None:
    """What to write in place of a field of another trainer, given its tables, its name and its value.

    The answer begins with `NOTHING` if gruppo has no such field. None if the name is unknown.
    """
    names = [part.lower().replace("-", "_") for part in location if not part.isdecimal()]
    ends = [".".join(names[-length:]) for length in range(min(3, len(names)), 0, -1)]
    for end in ends:
        if answer := NAMES.get(end):
            if answer == "optimizer.warmup_steps" and isinstance(value, float):
                answer = "optimizer.warmup_ratio"
            return _in_table(answer, location)
    return next((NOTHING + why for pattern, why in _REASONS for end in ends if fnmatchcase(end, pattern)), None)


def fields_named(location: Sequence[str], tables: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """All fields of gruppo with the last of these names, as `table.field`, in the order of the tables.

    Only one if the tables that the name was found in show which one is meant, and none if more than four have the name,
    because then it says too little.
    """
    found = [f"{table}.{field}" for table, fields in tables for field in fields if field == location[-1]]
    meant = [answer for field in found if (answer := _in_table(field, location)) != field or _is_in(field, location)]
    return meant[:1] or (found if len(found) <= 4 else [])


def _is_in(field: str, location: Sequence[str]) -> bool:
    return field.rpartition(".")[0] in [_TABLES.get(part, part) for part in location[:-1]]


def _in_table(answer: str, location: Sequence[str]) -> str:
    """The answer for a name that was found in one of the tables of `_TABLES`, or in one table of a list."""
    table = next((_TABLES[part] for part in location[:-1] if part in _TABLES), "")
    answer = _IN_TABLE.get(table, {}).get(answer, answer)
    if table == "evaluation":
        if answer == "evaluation.task" and "task" in location[:-1]:
            answer = "evaluation.task.name"
        answer = f"evaluation.{answer}" if answer.startswith("task.") else answer
    if location[0] in {"mixture", "benchmarks"} and len(location) > 2:
        start = "task." if location[0] == "mixture" else "evaluation."
        answer = f"{location[0]}[{location[1]}].{answer.removeprefix(start)}" if answer.startswith(start) else answer
    return answer
