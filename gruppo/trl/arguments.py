"""What becomes of every argument of TRL's trainers: it is mapped to a recipe, ignored without harm, or refused.

An argument is in exactly one of the three lists, whichever trainers have it. The words about it are those of the table
of foreign names (`gruppo.config.foreign_names`), except where a script needs others than a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from gruppo.config.foreign_names import NOTHING, gruppo_name
from gruppo.config.foreign_table import DEVICES
from gruppo.errors import UsageError
from gruppo.trl.configs import TrainingArguments
from gruppo.trl.quantization import BASE

# Mapped to a recipe, or used by the trainer; the words where the table of foreign names has none.
_BATCH = "sampling.prompts_per_step, sampling.group_size and method.minibatches"
MAPPED: Mapping[str, str] = {
    "output_dir": "the run folder is its subfolder gruppo; the trained model is saved in it",
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "generation_batch_size": _BATCH,
    "steps_per_generation": _BATCH,
    "num_generations": "sampling.group_size",
    "num_generations_eval": "completions per question of evaluate()",
    "num_train_epochs": "run.steps",
    "max_steps": "run.steps",
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule: linear, cosine, constant, constant_with_warmup",
    "warmup_steps": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "optim": 'AdamW, whichever implementation of it is named, with optimizer.state = "8bit" if its name has 8bit',
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.epsilon",
    "max_grad_norm": "optimizer.max_grad_norm; 0 does not clip",
    "bf16": 'model.dtype: "auto", which is bfloat16 where the device has it; "float32" for False',
    "fp16": 'model.dtype = "auto"; float16 is not supported',
    "use_cpu": "model.device",
    "no_cuda": "model.device",
    "logging_strategy": "state.log_history; the run folder records every step",
    "logging_steps": "state.log_history; the run folder records every step",
    "logging_first_step": "state.log_history; the run folder records every step",
    "disable_tqdm": "whether progress is shown",
    "run_name": "run.name",
    "report_to": "run.trackers",
    "eval_strategy": "when evaluate() runs during training",
    "evaluation_strategy": "eval_strategy",
    "eval_steps": "when evaluate() runs during training",
    "eval_on_start": "when evaluate() runs during training",
    "save_strategy": "run.checkpoint_every; the last step is always saved",
    "save_steps": "run.checkpoint_every",
    "seed": "run.seed",
    "resume_from_checkpoint": "for train(resume_from_checkpoint=…)",
    "push_to_hub": "the model is uploaded after training",
    "hub_model_id": "repository for push_to_hub()",
    "hub_token": "token for push_to_hub()",
    "hub_private_repo": "visibility of the repository of push_to_hub()",
    "hub_revision": "branch for push_to_hub()",
    "model_init_kwargs": f"model.trust_remote_code, and {BASE} for a 4-bit quantization_config with adapters; how else "
    "weights are loaded is gruppo's choice",
    "trust_remote_code": "model.trust_remote_code",
    "max_prompt_length": 'task.max_prompt_tokens, with task.overlong = "filter"',
    "max_completion_length": "sampling.max_tokens",
    "max_length": 'sampling.max_tokens, at most half of the context, with task.overlong = "filter"',
    "max_seq_length": "max_length",
    "temperature": "sampling.temperature",
    "generation_kwargs": "sampling.stop, from stop and stop_strings",
    "chat_template_kwargs": "task.chat_template_kwargs",
    "beta": "method.kl_coef; for DPO method.dpo_beta",
    "use_bias_correction_kl": "method.kl_importance",
    "num_iterations": "method.inner_updates",
    "epsilon": "method.clip_low and method.clip_high",
    "epsilon_high": "method.clip_high",
    "importance_sampling_level": "method.ratio",
    "reward_weights": "reward.weights",
    "scale_rewards": "method.scale, with method.advantage_epsilon = 1e-4",
    "loss_type": 'method.aggregation and method.surrogate: grpo, dapo, dr_grpo, bnpo, cispo, luspo',
    "mask_truncated_completions": "method.mask_truncated",
    "max_tool_calling_iterations": "environment.turns",
    "completion_only_loss": "the loss covers the completion, not the prompt",
    "assistant_only_loss": "the loss covers what the assistant wrote",
}  # fmt: skip

# They change no result of a run on one device, or only what is kept and shown.
_IGNORED = """
    average_tokens_across_devices bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica project
    trackio_space_id trackio_bucket_id trackio_static_space_id per_device_eval_batch_size prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_on_each_node save_total_limit enable_jit_checkpoint hub_strategy hub_always_push
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism data_seed accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
    length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict local_rank
    disable_dropout cast_lm_head_to_fp32 ds3_gather_for_generation pad_to_multiple_of cache_implementation use_vllm
    vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_cap sapo_temperature_neg sapo_temperature_pos vespo_k_pos
    vespo_lambda_pos vespo_k_neg vespo_lambda_neg ref_model_mixup_alpha ref_model_sync_steps entropy_coef_min
    entropy_coef_max entropy_coef_delta entropy_target log_completions log_multimodal num_completions_to_print
    log_unique_prompts use_transformers_continuous_batching transformers_continuous_batching_config
    use_transformers_paged dataset_num_proc padding_free precompute_ref_log_probs precompute_ref_batch_size
    f_alpha_divergence_coef discopop_tau activation_offloading pad_token eval_packing packing_strategy dataset_kwargs
    metric_for_best_model greater_is_better truncation_mode logging_dir overwrite_output_dir group_by_length
    use_mps_device save_safetensors include_tokens_per_second use_liger_loss vllm_device vllm_dtype vllm_max_model_len
    vllm_enable_prefix_caching wandb_log_unique_prompts
"""
IGNORED = frozenset(_IGNORED.split())

# They would change what is trained, and gruppo has nothing like them: a value other than the neutral one is refused.
_REFUSED = """
    lr_scheduler_kwargs optim_args optim_target_modules label_smoothing_factor neftune_noise_alpha auto_find_batch_size
    eval_delay load_best_model_at_end train_sampling_strategy router_aux_loss_coef shuffle_dataset top_p top_k min_p
    repetition_penalty vllm_structured_outputs_regex vllm_guided_decoding_regex delta multi_objective_aggregation
    sync_ref_model top_entropy_quantile entropy_coef use_adaptive_entropy off_policy_mask_threshold
    log_completions_hub_repo normalize_advantages reward_clip_range loss_weights ld_alpha f_divergence_type
    label_smoothing use_weighting chat_template_path dataset_text_field eos_token packing
"""
REFUSED = frozenset(_REFUSED.split())

# Values besides the default that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (None,), "top_k": (None, -1), "min_p": (0.0,), "repetition_penalty": (None,),
    "router_aux_loss_coef": (0.0,), "delta": (0,), "lr_scheduler_kwargs": ({},), "shuffle_dataset": (True, None),
    "neftune_noise_alpha": (0,), "loss_weights": ([1.0],), "include_num_input_tokens_seen": (False,),
}  # fmt: skip

_FULL = "training samples from the full distribution, so that π_old is the distribution that was sampled from"
_ENGINE = 'gruppo samples with its own engine; a recipe selects vLLM with engine.name = "vllm"'
_DEVICE = "a script trains on one device; `gruppo.train` takes a recipe with a table [cluster] (docs/ranks.md)"
_REASONS: Mapping[str, str] = {
    "top_p": _FULL,
    "top_k": _FULL,
    "min_p": _FULL,
    "repetition_penalty": _FULL,
    "vllm_structured_outputs_regex": _FULL,
    "vllm_guided_decoding_regex": _FULL,
    "sync_ref_model": "the reference is the initial policy",
    "load_best_model_at_end": "the last model is the result; the best checkpoint is kept",
    "log_completions_hub_repo": "nothing is uploaded during training; every completion is in the run folder",
    "dataset_text_field": "rows of plain text have no completion to train on; give prompt and completion, or messages",
    "vllm_gpu_memory_utilization": _ENGINE,
    "packing": "rows are never cut and joined; sequences are computed without padding anyway",
    "normalize_advantages": "advantages are not normalized a second time",
}  # fmt: skip


def words_of(name: str) -> str:
    """What becomes of an argument, in words, without a name of the list that it is in.

    Raises KeyError if it is in none.
    """
    if name in MAPPED:
        return MAPPED[name]
    if name not in IGNORED and name not in REFUSED:
        raise KeyError(name)
    words = _REASONS.get(name) or (gruppo_name([name]) or "it changes no result here").removeprefix(NOTHING)
    return _DEVICE if words == DEVICES else words


def default_of(entry: Field[Any]) -> Any:
    """The default of an argument."""
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def written(args: TrainingArguments) -> Iterator[tuple[str, Any]]:
    """Names and values of the arguments that change something of what TRL does by default."""
    for entry in fields(args):
        value = getattr(args, entry.name)
        if value != default_of(entry) and value not in _NEUTRAL.get(entry.name, ()):
            yield entry.name, value


def check(args: TrainingArguments) -> list[str]:
    """The names of the arguments that were written and are ignored.

    Raises UsageError, with one sentence for each, if arguments are refused.
    """
    refused = [f"{name} = {value!r}: {words_of(name)}; remove it" for name, value in written(args) if name in REFUSED]
    if refused:
        raise UsageError(f"{type(args).__name__}: {'. '.join(refused)}")
    return [name for name, _ in written(args) if name in IGNORED]
