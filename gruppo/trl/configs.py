"""Arguments of TRL's trainers (TRL 1.16), with the names, types and defaults that they have there.

What each argument becomes is in `gruppo.trl.arguments`. Fields of `Earlier` belong to versions of TRL before 1.16.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from inspect import get_annotations
from typing import Any


@dataclass(kw_only=True)
class Earlier:
    """Arguments of earlier versions of TRL and transformers, which scripts still write; None if not written."""

    max_prompt_length: int | None = None
    max_seq_length: int | None = None
    warmup_ratio: float | None = None
    evaluation_strategy: str | None = None
    logging_dir: str | None = None
    overwrite_output_dir: bool | None = None
    group_by_length: bool | None = None
    no_cuda: bool | None = None
    use_mps_device: bool | None = None
    save_safetensors: bool | None = None
    include_tokens_per_second: bool | None = None
    use_liger_loss: bool | None = None
    vllm_device: str | None = None
    vllm_dtype: str | None = None
    vllm_max_model_len: int | None = None
    vllm_enable_prefix_caching: bool | None = None
    vllm_guided_decoding_regex: str | None = None
    wandb_log_unique_prompts: bool | None = None


@dataclass
class TrainingArguments(Earlier):
    """The arguments that all trainers have."""

    output_dir: str | None = None
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-05
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_steps: float = 0
    optim: str = "adamw_torch"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-08
    optim_target_modules: list[str] | None = None
    gradient_accumulation_steps: int = 1
    average_tokens_across_devices: bool = True
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    bf16: bool | None = None
    fp16: bool = False
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    tf32: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    liger_kernel_config: dict[str, bool] | None = None
    use_cache: bool = False
    neftune_noise_alpha: float | None = None
    torch_empty_cache_steps: int | None = None
    auto_find_batch_size: bool = False
    logging_strategy: str = "steps"
    logging_steps: float = 10
    logging_first_step: bool = False
    log_on_each_node: bool = True
    logging_nan_inf_filter: bool = True
    include_num_input_tokens_seen: str | bool = "no"
    log_level: str = "passive"
    log_level_replica: str = "warning"
    disable_tqdm: bool | None = None
    report_to: list[str] | str | None = "none"
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    per_device_eval_batch_size: int = 8
    prediction_loss_only: bool = False
    eval_on_start: bool = False
    eval_do_concat_batches: bool = True
    eval_use_gather_object: bool = False
    eval_accumulation_steps: int | None = None
    include_for_metrics: list[str] = field(default_factory=list)
    batch_eval_metrics: bool = False
    save_only_model: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    save_on_each_node: bool = False
    save_total_limit: int | None = None
    enable_jit_checkpoint: bool = False
    push_to_hub: bool = False
    hub_token: str | None = None
    hub_private_repo: bool | None = None
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_always_push: bool = False
    hub_revision: str | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    ignore_data_skip: bool = False
    restore_callback_states_from_checkpoint: bool = False
    full_determinism: bool = False
    seed: int = 42
    data_seed: int | None = None
    use_cpu: bool = False
    accelerator_config: dict[str, Any] | str | None = None
    parallelism_config: str | None = None
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_multiprocessing_context: str | None = None
    dataloader_in_order: bool = True
    remove_unused_columns: bool | None = True
    label_names: list[str] | None = None
    train_sampling_strategy: str = "random"
    length_column_name: str = "length"
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    ddp_backend: str | None = None
    ddp_timeout: int = 1800
    fsdp: str | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    debug: str = ""
    skip_memory_metrics: bool = True
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    resume_from_checkpoint: str | None = None
    local_rank: int = -1
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    pad_to_multiple_of: int | str | None = "auto"

    def __post_init__(self) -> None:
        # Not `entry.type`: transformers' parser of command lines replaces it by the type of the text.
        kinds = {name: kind for base in type(self).__mro__[::-1] for name, kind in get_annotations(base).items()}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, str) and "dict" in str(kinds[entry.name]) and value.startswith("{"):
                setattr(self, entry.name, json.loads(value))  # as written on a command line
            elif isinstance(value, Enum):
                setattr(self, entry.name, value.value)
        self.eval_strategy = self.evaluation_strategy or self.eval_strategy

    @property
    def world_size(self) -> int:
        """The number of processes that train: a run has one."""
        return 1

    n_gpu = world_size

    @property
    def process_index(self) -> int:
        """The number of this process."""
        return 0

    local_process_index = process_index

    @property
    def should_save(self) -> bool:
        """Whether this process saves."""
        return True

    should_log = should_save

    @property
    def device(self) -> Any:
        """The device that gruppo picks, as a `torch.device`."""
        from gruppo.models.precision import choose_device

        return choose_device("cpu" if self.use_cpu or self.no_cuda else "auto")

    @property
    def train_batch_size(self) -> int:
        """Completions per device and pass."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Completions per device and pass in evaluations."""
        return self.per_device_eval_batch_size

    def get_warmup_steps(self, steps: int) -> int:
        """The optimizer steps of warm-up in a training of `steps` steps. A number below 1 is a share of them."""
        warmup = self.warmup_ratio if self.warmup_ratio else self.warmup_steps
        return math.ceil(steps * warmup) if warmup < 1 else int(warmup)

    def get_process_log_level(self) -> int:
        """The level for Python's `logging` that `log_level` names; warnings for "passive"."""
        return logging.getLevelNamesMapping().get(self.log_level.upper(), logging.WARNING)

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Does nothing: there is one process."""
        yield

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values, without tokens."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_token")}

    to_sanitized_dict = to_dict

    def to_json_string(self) -> str:
        """The arguments as JSON, without tokens."""
        return json.dumps(self.to_dict(), indent=2, default=str)


@dataclass
class _Online(TrainingArguments):
    """The arguments that trainers which sample have."""

    learning_rate: float = 1e-06
    disable_dropout: bool = False
    remove_unused_columns: bool | None = False
    num_generations_eval: int | None = None
    max_completion_length: int | None = 512
    ds3_gather_for_generation: bool = True
    shuffle_dataset: bool | None = True
    generation_batch_size: int | None = None
    steps_per_generation: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    generation_kwargs: dict[str, Any] | str | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    repetition_penalty: float = 1.0
    cache_implementation: str | None = None
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_model_impl: str = "vllm"
    vllm_enable_sleep_mode: bool = False
    vllm_structured_outputs_regex: str | None = None
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    vllm_group_port: int = 51216
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    num_iterations: int = 1
    epsilon: float = 0.2
    epsilon_high: float | None = None
    reward_weights: list[float] | None = None
    mask_truncated_completions: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    log_completions: bool = False
    log_multimodal: bool = True
    num_completions_to_print: int | None = None
    log_unique_prompts: bool = False
    use_transformers_continuous_batching: bool = False
    transformers_continuous_batching_config: dict[str, Any] | str | None = None
    use_transformers_paged: bool = False


@dataclass
class GRPOConfig(_Online):
    """Arguments of `GRPOTrainer`."""

    cast_lm_head_to_fp32: bool = False
    num_generations: int | None = 8
    beta: float = 0.0
    delta: float | None = None
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    importance_sampling_level: str = "token"
    multi_objective_aggregation: str = "sum_then_normalize"
    scale_rewards: str = "group"
    loss_type: str = "dapo"
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    entropy_coef_delta: float = 0.005
    entropy_target: float = 0.2
    max_tool_calling_iterations: int | None = None
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    off_policy_mask_threshold: float | None = None
    use_bias_correction_kl: bool = True
    log_completions_hub_repo: str | None = None
    vllm_importance_sampling_cap: float | None = None


@dataclass
class RLOOConfig(_Online):
    """Arguments of `RLOOTrainer`."""

    num_generations: int | None = 2
    beta: float = 0.05
    normalize_advantages: bool = False
    reward_clip_range: tuple[float, float] | None = None


@dataclass
class DPOConfig(TrainingArguments):
    """Arguments of `DPOTrainer`."""

    learning_rate: float = 1e-06
    disable_dropout: bool = True
    dataset_num_proc: int | None = None
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    padding_free: bool = False
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    label_smoothing: float = 0.0
    beta: float = 0.1
    use_weighting: bool = False
    discopop_tau: float = 0.05
    activation_offloading: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    pad_token: str | None = None


@dataclass
class SFTConfig(TrainingArguments):
    """Arguments of `SFTTrainer`."""

    learning_rate: float = 2e-05
    chat_template_path: str | None = None
    dataset_text_field: str = "text"
    dataset_kwargs: dict[str, Any] | str | None = None
    dataset_num_proc: int | None = None
    eos_token: str | None = None
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    shuffle_dataset: bool = False
    packing: bool = False
    packing_strategy: str = "bfd"
    padding_free: bool = False
    eval_packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    loss_type: str = "nll"
    activation_offloading: bool = False
    pad_token: str | None = None
