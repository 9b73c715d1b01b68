"""The table of names of other trainers: what each says in a recipe, or why gruppo has nothing for it.

The messages about wrong names, `gruppo convert` and docs/coming_from.md read it. A name with a dot matches only below
that table, such as verl's `model.path`.
"""

from __future__ import annotations

STEP = (
    "sampling.prompts_per_step × sampling.group_size, the completions of a step; the micro-batch is derived from "
    "run.memory"
)
_MINI_BATCH = (
    "method.minibatches, the number of parts of a step's completions (sampling.prompts_per_step × sampling.group_size) "
    "that have an update each"
)
_LENGTH = "task.max_prompt_tokens for the prompt and sampling.max_tokens for the completion"
CLIP = "method.clip_low and method.clip_high"
_KL = "method.kl_coef, the weight of the KL term"
_KL_IN_REWARD = 'method.kl_estimator = "k1", which subtracts the KL from the reward'
_REFERENCE = "run.iterations: the reference is reset at the start of each iteration"
_SCORER = 'reward.functions = ["classifier"], with options.classifier.model'
_SERVER = 'reward.functions = ["remote"], with options.remote.url; for a file, the path of its function'
_OUT = "--out"
_RESUME = "--resume"
DEVICES = "a run uses one device, model.device, or the ranks of the table [cluster] (docs/ranks.md)"
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
    "ckpt.path": _OUT,
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
    "tensorboard_dir": 'run.trackers = ["tensorboard"]',
    "wandb.key": 'run.trackers = ["wandb"]',
    "resume_from_checkpoint": _RESUME,
    "resume_mode": _RESUME,
    "load_checkpoint": _RESUME,
    "ckpt.load_enable": _RESUME,
    "resume_from_path": _RESUME,
    "data_seed": "run.seed",
    "random_state": "run.seed",
    "batch_size": "sampling.prompts_per_step",
    "rollout_batch_size": "sampling.prompts_per_step",
    "train_batch_size": f"sampling.prompts_per_step (verl), or {STEP}",
    "generation_batch_size": STEP,
    "per_device_train_batch_size": STEP,
    "gradient_accumulation_steps": STEP,
    "steps_per_generation": "method.minibatches, if it is more than gradient_accumulation_steps",
    "ppo_mini_batch_size": _MINI_BATCH,
    "mini_batch_size": _MINI_BATCH,
    "train.batch_size": _MINI_BATCH,
    "num_mini_batches": _MINI_BATCH,
    "gpu_memory_utilization": 'engine.memory, with engine.name = "vllm"',
    "vllm_gpu_memory_utilization": 'engine.memory, with engine.name = "vllm"',
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
    "kl.use_loss": f"method.kl_coef (0 for no KL); {_KL_IN_REWARD}",
    "kl.init_coef": _KL,
    "kl.estimator": "method.kl_estimator",
    "kl_loss_type": "method.kl_estimator",
    "kl_penalty": "method.kl_estimator",
    "use_bias_correction_kl": "method.kl_importance",
    "epsilon": CLIP,
    "eps": CLIP,
    "clip": CLIP,
    "clip_range": CLIP,
    "cliprange": CLIP,
    "clip_ratio": CLIP,
    "clip_eps": CLIP,
    "eps_clip": CLIP,
    "eps_clip_low_high": CLIP,
    "epsilon_low": "method.clip_low",
    "clip_ratio_low": "method.clip_low",
    "epsilon_high": "method.clip_high",
    "clip_ratio_high": "method.clip_high",
    "loss_type": 'method.name, or method.aggregation ("sequence-mean" is TRL\'s "grpo", "token-mean" its "dapo", '
    '"constant" its "dr_grpo")',
    "loss_agg_mode": "method.aggregation",
    "use_token_level_loss": 'method.aggregation = "token-mean"',
    "loss_mode": "method.name",
    "policy_loss_type": "method.name",
    "adv_estimator": "method.name",
    "advantage_estimator": "method.name",
    "advantage.estimator": "method.name",
    "algorithm": "method.name",
    "stage": "method.name",
    "scale_rewards": "method.scale",
    "normalize_advantages": "method.scale",
    "norm_adv_by_std_in_grpo": "method.scale",
    "no_advantage_std_norm": 'method.scale = "none"',
    "no_std_norm": 'method.scale = "none"',
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
    "dynamic_filtering_enable": "method.dynamic_sampling_rounds",
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
    "rollout_is": "method.tis_cap",
    "is_correction_level": "method.tis_cap",
    "is_correction_threshold": "method.tis_cap",
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
    "adam.eps": "optimizer.epsilon",
    "l2": "optimizer.weight_decay",
    "grad_clip": "optimizer.max_grad_norm",
    "optimizer.clip": "optimizer.max_grad_norm",
    "clip_grad": "optimizer.max_grad_norm",
    "max_norm": "optimizer.max_grad_norm",
    "adam_offload": 'optimizer.state = "cpu"',
    "optimizer_offload": 'optimizer.state = "cpu"',
    # Model
    "model_name_or_path": "model.name",
    "base_model_name_or_path": "model.name",
    "model_name": "model.name",
    "model_id": "model.name",
    "pretrain": "model.name",
    "model.path": "model.name",
    "adapter_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "param_dtype": "model.dtype",
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
    "lora.rank": "model.lora.rank",
    "lora.alpha": "model.lora.alpha",
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
    "prompt_dataset": "task.name",
    "datasets": "the table [task], or one table [[mixture]] for each of them",
    "prompt_data_probs": "mixture.weight, in one table [[mixture]] for each task",
    "interleave_probs": "mixture.weight, in one table [[mixture]] for each task",
    "prompt_probs": "mixture.weight, in one table [[mixture]] for each task",
    "val_files": "evaluation.task",
    "eval_dataset": "evaluation.task",
    "dataset_config": "task.options.name",
    "dataset_mixture": "the table [task], or one table [[mixture]] for each of them",
    "prompt_split": "task.split",
    "dataset_train_split": "task.split",
    "dataset_test_split": "evaluation.task.split",
    "eval_split": "evaluation.task.split",
    "val_size": "task.held_out",
    "test_split_size": "task.held_out",
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
    "custom_reward_function.name": "reward.functions",
    "reward_manager": "reward.functions",
    "reward_manager.name": "reward.functions",
    "remote_rm_url": _SERVER,
    "remote_url": _SERVER,
    "reward_weights": "reward.weights",
    "reward_pretrain": _SCORER,
    "reward_model_path": _SCORER,
    "reward_model_name_or_path": _SCORER,
    "reward.model_name_or_path": _SCORER,
    "reward_model.model.path": _SCORER,
    "reward_model.model_path": _SCORER,
    "overlong_buffer_len": 'reward.functions = ["overlong"], with options.overlong.buffer_tokens',
    "overlong_penalty_factor": "reward.weights, the weight of the function overlong",
    "overlong_buffer.enable": 'reward.functions = ["overlong"]',
    "overlong_buffer.len": "reward.options.overlong.buffer_tokens",
    "overlong_buffer.penalty_factor": "reward.weights, the weight of the function overlong",
    "overlong_buffer_cfg.enable": 'reward.functions = ["overlong"]',
    "overlong_buffer_cfg.len": "reward.options.overlong.buffer_tokens",
    "overlong_buffer_cfg.penalty_factor": "reward.weights, the weight of the function overlong",
    # Evaluation
    "eval_steps": "evaluation.every",
    "test_freq": "evaluation.every",
    "eval.steps": "evaluation.every",
    "num_generations_eval": "evaluation.samples",
    "eval_n_samples_per_prompt": "evaluation.samples",
    "eval_temperature": "evaluation.decoding.temperature",
    "top_k": "evaluation.decoding.top_k (training samples from the full distribution)",
    "top_p": "evaluation.decoding.top_p (training samples from the full distribution)",
    "min_p": "evaluation.decoding.min_p (training samples from the full distribution)",
    "do_sample": "evaluation.decoding.temperature (0 takes the most likely token; training always samples)",
}

# Tables about other models than the policy, in which a name never means the field that it means elsewhere.
OTHER_MODELS = ("reward_model.rollout.*", "distillation.*")

# Reason why a name needs no field -> the names, which change nothing that a model learns; "*" stands for any text.
IGNORED = {
    "every step is recorded in the run folder": "logging_* log_level* log_on_each_node log_completions* "
    "log_unique_prompts disable_tqdm debug logger.logging_steps num_completions_to_print include_num_input_tokens_seen "
    "include_for_metrics skip_memory_metrics plot_loss *profiler* *prometheus* trace.* disable_log_stats "
    "log_val_generations rollout_data_dir validation_data_dir calculate_entropy calculate_sum_pi_squared "
    "moe_load_balance_metrics_interval",
    "a tracker has its own environment variables, such as WANDB_PROJECT (docs/trackers.md)": "wandb_* *wandb.* "
    "trackio_* swanlab_* project project_name",
    "training uploads nothing; `gruppo export RUN --push OWNER/NAME` does, afterwards": "push_to_hub hub_* "
    "default_hdfs_dir",
    'gruppo samples with its own engine; a recipe selects vLLM with engine.name = "vllm"': "vllm_* use_vllm sglang_* "
    "fast_inference rollout.mode enforce_eager "
    "enable_chunked_prefill enable_prefix_caching free_cache_engine cache_implementation use_cache "
    "max_num_batched_tokens max_num_seqs max_model_len transformers_continuous_batching_config generation_kwargs "
    "use_transformers_continuous_batching use_transformers_paged ds3_gather_for_generation async_train vllm.* "
    "rollout.name rollout.dtype rollout.seed rollout.full_determinism cudagraph_capture_sizes logprobs_mode "
    "scheduling_policy load_format layered_summon multi_stage_wake_up engine_kwargs engine_kwargs.* router_config_path "
    "skip_tokenizer_init disaggregation.* checkpoint_engine.* custom_async_server.* calculate_log_probs "
    "rollout.max_batch_size over_sample_rate rollout.quantization rollout.quantization_config_file prompt_length "
    "save_hf",
    "a reward model needs no server": "reward_model.rollout.*",
    "the micro-batch is derived from run.memory": "*micro_batch_size* micro_train_batch_size micro_rollout_batch_size "
    "eval_batch_size per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size torch_empty_cache_steps "
    "precompute_ref_batch_size use_dynamic_bsz use_dynamic_batch *max_token_len_per_gpu *max_tokens_per_gpu "
    "val_batch_size eval_do_concat_batches batch_eval_metrics log_prob_use_dynamic_bsz dynamic_batch_enable",
    "activations are recomputed when run.memory requires it": "gradient_checkpointing* enable_gradient_checkpointing "
    "use_gradient_checkpointing activation_* enable_activation_offload entropy_from_logits_* entropy_checkpointing",
    DEVICES: "ddp_* fsdp fsdp_* *fsdp.* *fsdp_config.* *megatron.* deepspeed deepspeed_* local_rank "
    "accelerator_config parallelism_config *parallel_size n_gpus_per_node nnodes *_num_nodes "
    "*_num_gpus_per_node num_nodes num_gpus_per_node colocate_* zero_stage zpg ds.* param_offload grad_offload "
    "*.offload device_map average_tokens_across_devices eval_use_gather_object "
    "use_cpu_offload ring_attn_size ring_head_stride balance_batch strategy nccl_timeout hybrid_engine use_shm ray_* "
    "transfer_queue.* *enable_sleep enable_resource_pool grad_accum_dtype overlap_comm trainer.device num_processes",
    "model.attention chooses the kernels of attention": "attn_implementation flash_attn use_flash_attention*",
    "model.compile = true compiles the layers": "torch_compile* use_torch_compile",
    "evaluation computes in model.dtype": "bf16_full_eval fp16_full_eval",
    "gruppo chooses its other kernels": "use_liger* liger_* use_fused_kernels fused_kernel_options.* tiled_mlp.* "
    "use_prefix_grouper cast_lm_head_to_fp32 jit_mode_eval enable_jit_checkpoint use_unsloth* tf32 full_determinism "
    "full_determinism_enable optimizer_impl override_optimizer_config",
    "sequences are packed without padding": "packing packing_* packing_samples eval_packing neat_packing padding_free "
    "pad_to_multiple_of pad_to_length pad_to_length_bucket padding_side use_remove_padding use_rmpad group_by_length "
    "length_column_name",
    "gruppo reads and tokenizes the rows itself": "dataloader_* dataset_num_proc dataset_kwargs dataset_streaming "
    "streaming preprocessing_num_workers overwrite_cache remove_unused_columns label_names train_sampling_strategy "
    "ignore_data_skip filter_overlong_prompts_workers reward_fn_key return_* disable_fast_tokenizer",
    "run.seed determines the order of the prompts": "shuffle shuffle_dataset shuffle_data data.shuffle "
    "data_loader_seed validation_shuffle",
    "tokenizer and chat template are those of the model": "tokenizer_name tokenizer_name_or_path data.tokenizer "
    "tokenizer_path hf_config_path value_head_prefix use_inference_chat_template tokenization_sanity_check_mode",
    "the latest two checkpoints and the best are kept": "save_total_limit save_strategy save_only_model "
    "save_on_each_node load_best_model_at_end metric_for_best_model greater_is_better max_ckpt_num "
    "max_actor_ckpt_to_keep max_critic_ckpt_to_keep restore_callback_states_from_checkpoint checkpoint.* ckpt.* "
    "overwrite_output_dir esi_redundant_time checkpoint_callback_class del_local_ckpt_after_load save_value_network "
    "save_hf_ckpt disable_ds_ckpt use_universal_ckpt",
    "evaluation takes place before the first step, after the last, and every evaluation.every steps": "eval_strategy "
    "evaluation_strategy eval_on_start eval_delay val_before_train",
    "`gruppo train` trains and `gruppo eval` evaluates": "do_train do_eval do_predict prediction_loss_only val_only",
    "gruppo computes the log-probabilities of the reference when it needs them": "precompute_ref_log_probs",
    "gruppo runs reward functions in reward.workers processes": "reward_model.num_workers reward.num_workers "
    "agent.num_workers launch_reward_fn_async",
    "models and data come from the Hugging Face hub or a folder": "use_ms",
    "it is a setting of debugging": "ignore_bias_buffers skip.* dry_run",
    "gruppo trains text models": "freeze_vision_* freeze_language_model freeze_visual_encoder image_patch_size "
    "mm_processor_kwargs image_key video_key audio_key max_images_per_prompt limit_images log_multimodal",
}

# Reason why gruppo has no such field -> the names, which do change what a model learns.
MISSING = {
    "chat template and special tokens are those of the model": "eos_token pad_token chat_template_path "
    "custom_chat_template chat_template",
    "prompts are never truncated, only refused or left out (task.overlong)": "truncation_mode truncation_side",
    "the loss covers the completion, not the prompt": "completion_only_loss assistant_only_loss train_on_prompt "
    "train_on_inputs train_on_responses_only mask_history",
    "run.steps limits the training, and evaluation.questions the evaluation": "max_samples max_train_samples "
    "max_eval_samples train_max_samples val_max_samples",
    'the optimizer is AdamW; optimizer.state = "8bit" stores its moments in 8 bits': "optim optim_args "
    "optim_target_modules optimizer_type optim_type optim.optimizer "
    "galore_* use_galore apollo_* use_apollo badam_* use_badam neftune_noise_alpha loraplus_* muon.*",
    "schedules are constant, linear or cosine, without options": "lr_scheduler_kwargs lr_scheduler_args min_lr_ratio "
    "min_lr num_cycles zero_indexed_step",
    "there is no dropout, so that sampling and training use the same distribution": "*dropout disable_dropout "
    "dropout_position",
    "adapters are plain LoRA: rank, alpha and targets": "lora_modules_to_save modules_to_save lora_target_parameters "
    "target_parameters lora_task_type task_type use_dora use_rslora init_lora_weights lora_bias layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern exclude_modules loftq_config additional_target pissa_* bias lora.type "
    "lora.merge lora.dtype lora_a_init_method lora_b_init_method a2a_experimental lora_adapter_path adapter_path",
    'trained weights are float32, not quantized; for QLoRA, write model.lora.base = "4bit"': "load_in_4bit "
    "load_in_8bit bnb_* use_bnb_nested_quant quantization_bit quantization_method full_finetuning *qat.* rollout.qat",
    'model.name loads the files as they are; for another revision, write "owner/name@revision"': "model_revision "
    "model_init_kwargs cache_dir override_config override_config.* external_lib",
    "training samples from the full distribution": "repetition_penalty frequency_penalty presence_penalty "
    "length_penalty num_beams bad_words guided_decoding* ignore_eos",
    "the loss has no entropy term": "entropy_* use_entropy* use_adaptive_entropy top_entropy_quantile ent_coef",
    "the policy term has two bounds, method.clip_low and method.clip_high": "delta dual_clip clip_ratio_c "
    "unbiased_gradient off_policy_mask_threshold sapo_* vespo_* vllm_importance_sampling_mode "
    "vllm_importance_sampling_clip_min policy_loss.* tau_pos tau_neg",
    "method.tis_cap truncates weights, and nothing rejects completions": "rollout_correction.* is_correction_* "
    "enable_rollout_routing_replay vllm_is_correction_type use_icepop",
    "method.kl_coef is constant": "kl_target kl_horizon target_kl horizon ppo_target adap_kl_ctrl kl_ctrl.type "
    "kl.target",
    "rewards are used as they are; write a reward function that changes them": "reward_clip_range reward.clip_range "
    "normalize_reward normalize_enable multi_objective_aggregation center_rewards_coefficient whiten_rewards "
    "ppo_whiten_rewards ppo_score_norm missing_eos_penalty stop_properly_penalty_coef *pf_ppo* overlong_buffer.* "
    "overlong_buffer_cfg.*",
    "a reward is a function; write reward.functions": "reward_manager* sandbox_fusion.* reward_loop_* "
    "reward_model.enable reward_model.path",
    "the loss of DPO is logistic, with method.dpo_beta": "label_smoothing label_smoothing_factor loss_weights ld_alpha "
    "f_divergence_type f_alpha_divergence_coef discopop_tau use_weighting desirable_weight undesirable_weight pref_* "
    "dpo_label_smoothing simpo_gamma kto_*",
    "the reference is the initial policy": "ref_model_mixup_alpha ref_model ref_model_adapters ref_adapter_name",
    "the loss has no term for the router of experts": "router_aux_loss_coef aux_loss_coef moe_aux_loss_coef",
    'aggregation = "constant" divides by sampling.max_tokens': "loss_scale_factor",
    "sampling and training take turns, with the current weights": "async_enable async_queue_size "
    "partial_rollout_enable trainer.use_v1 trainer.v1.*",
    "policy and value model are trained from the first step on": "critic_warmup critic.enable freezing_steps",
    "there is no moving average of the weights": "enable_ema ema_beta",
    "there is no distillation": "distillation.*",
    "the model predicts one token at a time": "mtp.* rollout.mtp",
    "conversations of several turns are a table [environment]": "multi_turn.* agent.* tool_config_path "
    "function_tool_path",
    'rows of your own are a function, task.name = "file.py:function"': "custom_cls.*",
    "dropped groups are those whose rewards are all equal": "filter_groups.* dynamic_filtering_range "
    "dynamic_filtering_reward_range",
    "a step samples sampling.prompts_per_step prompts": "gen_batch_size",
}
