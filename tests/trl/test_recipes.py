"""The recipe of a trainer's arguments."""

from __future__ import annotations

from typing import Any

import pytest

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig
from gruppo.trl.batches import batches_of
from gruppo.trl.configs import TrainingArguments
from gruppo.trl.recipes import length_of, recipe_of


def field(args: TrainingArguments, name: str, chat: bool = False) -> Any:
    mapping = recipe_of(args, length_of(args, batches_of(args), 100), "model", None, chat, 4096)
    value: Any = load_recipe(mapping)
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        # TRL's defaults where the user wrote nothing
        (GRPOConfig(), "method.aggregation", "token-mean"),
        (GRPOConfig(), "method.advantage_epsilon", 1e-4),
        (GRPOConfig(), "method.kl_coef", 0.0),
        (GRPOConfig(), "method.kl_importance", False),
        (GRPOConfig(), "optimizer.schedule", "linear"),
        (GRPOConfig(), "optimizer.learning_rate", 1e-6),
        (GRPOConfig(), "sampling.max_tokens", 512),
        (GRPOConfig(), "sampling.group_size", 8),
        (GRPOConfig(), "run.steps", 300),
        (GRPOConfig(), "run.seed", 42),
        (GRPOConfig(), "model.dtype", "auto"),
        (RLOOConfig(), "method.name", "rloo"),
        (RLOOConfig(), "method.kl_coef", 0.05),
        (DPOConfig(), "method.dpo_beta", 0.1),
        (DPOConfig(), "method.aggregation", "sequence-sum"),
        (DPOConfig(), "method.source", "dataset"),
        (SFTConfig(), "optimizer.learning_rate", 2e-5),
        (SFTConfig(), "method.aggregation", "token-mean"),
        (SFTConfig(), "sampling.max_tokens", 1024),
        # what the user writes
        (GRPOConfig(loss_type="grpo"), "method.aggregation", "sequence-mean"),
        (GRPOConfig(loss_type="dr_grpo"), "method.aggregation", "constant"),
        (GRPOConfig(loss_type="luspo"), "method.aggregation", "sequence-sum"),
        (GRPOConfig(loss_type="cispo", epsilon_high=5.0), "method.surrogate", "clipped-weight"),
        (GRPOConfig(loss_type="cispo", epsilon_high=5.0), "method.clip_high", 4.0),
        (GRPOConfig(epsilon=0.1), "method.clip_high", 0.1),
        (GRPOConfig(epsilon=0.1, epsilon_high=0.3), "method.clip_low", 0.1),
        (GRPOConfig(scale_rewards=False), "method.scale", "none"),  # type: ignore[arg-type]
        (GRPOConfig(scale_rewards="batch"), "method.scale", "batch"),
        (GRPOConfig(beta=0.04), "method.kl_importance", True),
        (GRPOConfig(beta=0.04, use_bias_correction_kl=False), "method.kl_importance", False),
        (GRPOConfig(importance_sampling_level="sequence"), "method.ratio", "sequence"),
        (GRPOConfig(num_iterations=2, steps_per_generation=4), "method.minibatches", 4),
        (GRPOConfig(num_iterations=2), "method.inner_updates", 2),
        (GRPOConfig(generation_kwargs={"stop": "\n"}), "sampling.stop", ["\n"]),
        (GRPOConfig(max_prompt_length=64), "task.overlong", "filter"),
        (GRPOConfig(bf16=False), "model.dtype", "float32"),
        (GRPOConfig(use_cpu=True), "model.device", "cpu"),
        (GRPOConfig(lr_scheduler_type="constant_with_warmup", warmup_steps=5), "optimizer.warmup_steps", 5),
        (GRPOConfig(warmup_ratio=0.1), "optimizer.warmup_steps", 30),
        (GRPOConfig(warmup_steps=0.1), "optimizer.warmup_steps", 30),
        (GRPOConfig(warmup_ratio=0.1, num_iterations=2), "optimizer.warmup_steps", 30),
        (GRPOConfig(save_steps=10, num_iterations=2), "run.checkpoint_every", 5),
        (GRPOConfig(save_strategy="no"), "run.checkpoint_every", 300),
        (GRPOConfig(max_grad_norm=0.0), "optimizer.max_grad_norm", 1e12),
        (GRPOConfig("a/my run"), "run.name", "my-run"),
        (GRPOConfig(report_to=["wandb", "none"]), "run.trackers", ["wandb"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TrainingArguments) else str(value),
)
def test_arguments_become_fields(args: TrainingArguments, name: str, value: Any) -> None:
    assert field(args, name) == value


def test_chat_options_are_for_conversations() -> None:
    args = GRPOConfig(chat_template_kwargs={"enable_thinking": False})
    assert field(args, "task.chat_template_kwargs", chat=True) == {"enable_thinking": False}
    assert field(args, "task.chat_template_kwargs", chat=False) is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (GRPOConfig(loss_type="sapo"), ['loss_type = "sapo"', "dr_grpo", "method.surrogate"]),
        (GRPOConfig(loss_type="bnpo", gradient_accumulation_steps=2), ["bnpo", '"dapo"']),
        (GRPOConfig(loss_type="cispo"), ["epsilon_high = 0.2", "5.0"]),
        (GRPOConfig(scale_rewards="all"), ["scale_rewards = 'all'", '"batch"']),
        (GRPOConfig(lr_scheduler_type="polynomial"), ["polynomial", "cosine"]),
        (GRPOConfig(optim="adafactor"), ["adafactor", "AdamW"]),
        (GRPOConfig(generation_kwargs={"num_beams": 4}), ["num_beams", "full distribution"]),
        (GRPOConfig(model_init_kwargs={"revision": "v2"}), ["revision", "'v2'"]),
        (RLOOConfig(num_iterations=2), ["num_iterations = 2", "num_iterations=1"]),
        (DPOConfig(loss_type=["ipo"]), ["ipo", '["sigmoid"]']),
        (SFTConfig(completion_only_loss=False), ["completion_only_loss = False"]),
    ],
    ids=lambda value: "" if isinstance(value, TrainingArguments) else value[0],
)
def test_what_gruppo_lacks_is_refused_with_words(args: TrainingArguments, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        field(args, "run.steps")
    assert all(word in str(caught.value) for word in words)
